-- Whether the agent has dialled the carrier for bulk.
ALTER TABLE tunnels ADD COLUMN bulk BOOLEAN NOT NULL DEFAULT false;
