-- +goose Up
-- An event's id is its sender's to choose, so it names an event only within its source: the key of the delivery log begins there.
-- SQLite cannot change a key, so the table is copied.
CREATE TABLE deliveries_by_source (
    handler         text NOT NULL,
    event_id        text NOT NULL,
    type            text NOT NULL,
    source          text NOT NULL,
    origin          text NOT NULL,
    object_id       text,
    user_id         text,
    status          text NOT NULL CHECK (status IN ('processed', 'retrying', 'dead', 'discarded')),
    attempts        integer NOT NULL DEFAULT 0,
    received_at     datetime NOT NULL,
    processed_at    datetime,
    duration_ms     double precision,
    error           text,
    reason          text,
    stream_seq      bigint,
    first_failed_at datetime,
    next_attempt_at datetime,
    fingerprint     text,
    letter_seq      bigint,
    replay_id       text,
    PRIMARY KEY (handler, source, event_id)
);
INSERT INTO deliveries_by_source SELECT handler, event_id, type, source, origin, object_id, user_id, status, attempts, received_at, processed_at,
    duration_ms, error, reason, stream_seq, first_failed_at, next_attempt_at, fingerprint, letter_seq, replay_id
FROM deliveries;
DROP TABLE deliveries;
ALTER TABLE deliveries_by_source RENAME TO deliveries;
CREATE INDEX deliveries_received ON deliveries (received_at);
CREATE INDEX deliveries_open ON deliveries (status, received_at) WHERE status <> 'processed';
CREATE INDEX deliveries_user ON deliveries (user_id, received_at) WHERE user_id IS NOT NULL;
CREATE INDEX deliveries_dead ON deliveries (handler, reason, fingerprint) WHERE status = 'dead';
