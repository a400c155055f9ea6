-- +goose Up
-- The delivery log, which is also the inbox: what a handler did with an event, once per handler and event.
CREATE TABLE deliveries (
    handler      text NOT NULL,
    event_id     text NOT NULL,
    type         text NOT NULL,
    source       text NOT NULL,
    origin       text NOT NULL,
    object_id    text,
    user_id      text,
    status       text NOT NULL CHECK (status IN ('processed', 'retrying', 'dead', 'discarded')),
    attempts     integer NOT NULL DEFAULT 0,
    received_at  datetime NOT NULL,
    processed_at datetime,
    duration_ms  double precision,
    error        text,
    reason       text,
    stream_seq   bigint,
    PRIMARY KEY (handler, event_id)
);
-- The newest first, and everything of a span of time. Appended in order, so it costs little.
CREATE INDEX deliveries_received ON deliveries (received_at);
-- What needs somebody: few rows, so this index is nearly free.
CREATE INDEX deliveries_open ON deliveries (status, received_at) WHERE status <> 'processed';
-- One person's timeline.
CREATE INDEX deliveries_user ON deliveries (user_id, received_at) WHERE user_id IS NOT NULL;
