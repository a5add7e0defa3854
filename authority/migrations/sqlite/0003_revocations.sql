-- What is revoked. Of an identity, the certificates whose life begins at that second or earlier; of
-- a certificate (its name is its serial number), itself. A row stays after its certificates have
-- expired, for they could be renewed otherwise.
CREATE TABLE revocations (
    kind            TEXT NOT NULL CHECK (kind IN ('cluster', 'user', 'certificate')),
    name            TEXT NOT NULL,
    last_not_before INTEGER NOT NULL, -- seconds
    revoked_at      INTEGER NOT NULL,
    listed_until    INTEGER NOT NULL, -- no certificate that it is about lives longer
    PRIMARY KEY (kind, name)
) STRICT;
