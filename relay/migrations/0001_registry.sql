-- The registry that relays share. Times are milliseconds since 1970, UTC, by the relays' clocks, but
-- for heartbeats, which are the database's own.
--
-- Up to version 3 these files and those of the authority were one set, with the same numbers.

-- The relays that are up. A row whose heartbeat is older than 15 s is a dead relay's, and goes
-- with its tunnels.
CREATE TABLE relays (
    instance     TEXT PRIMARY KEY,
    address      TEXT NOT NULL, -- HOST:PORT of its listener for peers
    version      TEXT NOT NULL,
    started_at   BIGINT NOT NULL, -- microseconds; tells a process from its predecessor of that name
    heartbeat_at TIMESTAMPTZ NOT NULL,
    draining     BOOLEAN NOT NULL
);

-- One row for each carrier of an agent, written when it comes and when it goes.
CREATE TABLE tunnels (
    relay          TEXT NOT NULL REFERENCES relays (instance) ON DELETE CASCADE,
    carrier        BIGINT NOT NULL, -- never used twice by one process
    cluster        TEXT NOT NULL,
    agent_instance TEXT NOT NULL,
    since          BIGINT NOT NULL,
    PRIMARY KEY (relay, carrier)
);
