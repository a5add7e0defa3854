-- What relays share. Times are milliseconds since 1970, UTC, by the relays' clocks, but for
-- heartbeats, which are the database's own. The CA's key is never here.

CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- An enrolment token; only the hash of its secret is kept.
CREATE TABLE tokens (
    secret_hash BYTEA PRIMARY KEY,
    kind        TEXT NOT NULL CHECK (kind IN ('cluster', 'user')),
    name        TEXT NOT NULL,
    groups      TEXT NOT NULL, -- JSON array of strings
    created_at  BIGINT NOT NULL,
    expires_at  BIGINT NOT NULL,
    redeemed_at BIGINT
);

-- Every certificate issued to a cluster or a user.
CREATE TABLE certificates (
    serial       TEXT PRIMARY KEY,
    kind         TEXT NOT NULL,
    name         TEXT NOT NULL,
    fingerprint  BYTEA NOT NULL,
    not_before   BIGINT NOT NULL,
    not_after    BIGINT NOT NULL,
    issued_at    BIGINT NOT NULL,
    enrolled_at  BIGINT NOT NULL, -- of the token at the head of the chain of renewals
    renewed_from TEXT REFERENCES certificates (serial)
);

CREATE INDEX certificates_by_name ON certificates (kind, name);

CREATE TABLE clusters (
    name               TEXT PRIMARY KEY,
    created_at         BIGINT NOT NULL,
    enrolled_at        BIGINT,
    last_connected_at  BIGINT,
    last_seen_at       BIGINT,
    kubernetes_version TEXT,
    agent_version      TEXT
);

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
