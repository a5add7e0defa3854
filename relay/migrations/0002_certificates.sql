-- The serial of the certificate that the agent has proved; empty where its relay does not tell.
ALTER TABLE tunnels ADD COLUMN certificate TEXT NOT NULL DEFAULT '';
