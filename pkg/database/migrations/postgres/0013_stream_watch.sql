-- +goose Up
-- What each handler's workers last saw of the stream, by which a broker or a database that lost something, or was taken back, is noticed.
CREATE TABLE stream_watch (
    handler      text PRIMARY KEY,
    stream_id    text NOT NULL,              -- when the broker created the stream: another time is another stream
    process      text NOT NULL,              -- who looked last
    seen_at      timestamptz NOT NULL,       -- when; long ago once a process has stopped
    last_seq     bigint NOT NULL,            -- of the stream
    floor_seq    bigint NOT NULL,            -- settled by the handler up to here
    purged_seq   bigint NOT NULL DEFAULT 0,  -- removed by Usher up to here
    holes        bigint NOT NULL DEFAULT 0,  -- sequences without an event behind the first one
    gap          text NOT NULL DEFAULT '',   -- what is missing, in words; empty for nothing
    gap_events   bigint NOT NULL DEFAULT 0,  -- how many
    gap_from     bigint NOT NULL DEFAULT 0,  -- the first event in the stream that the database lacks, 0 where the stream lacks it
    gap_to       bigint NOT NULL DEFAULT 0,
    gap_found_at timestamptz
);
