-- +goose Up
-- What a retry, a dead letter and a replay must remember of a delivery.
ALTER TABLE deliveries ADD COLUMN first_failed_at timestamptz;   -- of the attempts since the event came or was replayed
ALTER TABLE deliveries ADD COLUMN next_attempt_at timestamptz;   -- status retrying: not before
ALTER TABLE deliveries ADD COLUMN fingerprint text;            -- of the failure: same handler, reason and normalised error
ALTER TABLE deliveries ADD COLUMN letter_seq bigint;           -- status dead: the dead letter's sequence in CLERK_DLQ
ALTER TABLE deliveries ADD COLUMN replay_id text;              -- the deliberate replay that wrote this row last
-- Dead letters are counted and grouped without reading them.
CREATE INDEX deliveries_dead ON deliveries (handler, reason, fingerprint) WHERE status = 'dead';

-- Who changed what on purpose: replays, discards.
CREATE TABLE audit_log (
    id       text COLLATE "C" PRIMARY KEY,   -- sorts by time
    at       timestamptz NOT NULL,
    actor    text NOT NULL,
    action   text NOT NULL,        -- dead_letters.replay, dead_letters.discard, events.replay
    selector text NOT NULL,        -- what was asked for, as the flags say it
    affected bigint NOT NULL,      -- how many events
    failed   bigint NOT NULL,      -- how many of them could not be changed
    detail   text                  -- why it stopped, empty where it came to its end
);
CREATE INDEX audit_log_at ON audit_log (at);
