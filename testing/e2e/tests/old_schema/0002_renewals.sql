-- A certificate is deleted when nothing can be renewed from it any more, whatever was renewed from it:
-- so renewed_from refers to no row.
ALTER TABLE certificates DROP CONSTRAINT certificates_renewed_from_fkey;
-- SHA-256 of the public key; of the oldest it is not known.
ALTER TABLE certificates ADD COLUMN key_hash BYTEA;

DROP INDEX certificates_by_name;
CREATE INDEX certificates_by_name ON certificates (kind, name, issued_at);
CREATE INDEX certificates_by_predecessor ON certificates (renewed_from);
CREATE INDEX certificates_by_end ON certificates (not_after);

-- The UID of the namespace kube-system of the cluster that has this name.
ALTER TABLE clusters ADD COLUMN cluster_uid TEXT;
-- When its name was given up: certificates that were enrolled before are not renewed.
ALTER TABLE clusters ADD COLUMN released_at BIGINT;
-- When two successors of one of its certificates were last seen.
ALTER TABLE clusters ADD COLUMN renewed_twice_at BIGINT;

-- The serial of the certificate that the agent has proved; empty where its relay does not tell.
ALTER TABLE tunnels ADD COLUMN certificate TEXT NOT NULL DEFAULT '';
