-- A certificate is deleted when nothing can be renewed from it any more, whatever was renewed from it:
-- so renewed_from refers to no row.
CREATE TABLE certificates_2 (
    serial       TEXT PRIMARY KEY,
    kind         TEXT NOT NULL,
    name         TEXT NOT NULL,
    fingerprint  BLOB NOT NULL,
    key_hash     BLOB, -- SHA-256 of the public key; of the oldest it is not known
    not_before   INTEGER NOT NULL,
    not_after    INTEGER NOT NULL,
    issued_at    INTEGER NOT NULL,
    enrolled_at  INTEGER NOT NULL, -- of the token at the head of the chain of renewals
    renewed_from TEXT -- the serial of its predecessor
) STRICT;

INSERT INTO certificates_2 (serial, kind, name, fingerprint, not_before, not_after, issued_at,
                            enrolled_at, renewed_from)
SELECT serial, kind, name, fingerprint, not_before, not_after, issued_at, enrolled_at, renewed_from
FROM certificates;

DROP TABLE certificates;
ALTER TABLE certificates_2 RENAME TO certificates;

CREATE INDEX certificates_by_name ON certificates (kind, name, issued_at);
CREATE INDEX certificates_by_predecessor ON certificates (renewed_from);
CREATE INDEX certificates_by_end ON certificates (not_after);

-- The UID of the namespace kube-system of the cluster that has this name.
ALTER TABLE clusters ADD COLUMN cluster_uid TEXT;
-- When its name was given up: certificates that were enrolled before are not renewed.
ALTER TABLE clusters ADD COLUMN released_at INTEGER;
-- When two successors of one of its certificates were last seen.
ALTER TABLE clusters ADD COLUMN renewed_twice_at INTEGER;
