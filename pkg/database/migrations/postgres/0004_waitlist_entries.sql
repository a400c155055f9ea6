-- +goose Up
CREATE TABLE waitlist_entries (
    id               text PRIMARY KEY,
    source           text NOT NULL,                              -- the configured Clerk instance
    email            text,
    status           text,
    is_locked        boolean NOT NULL DEFAULT false,
    invitation_id    text,
    clerk_created_at timestamptz,
    clerk_updated_at timestamptz,
    version          bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at          bigint NOT NULL,                            -- ms since the epoch
    deleted_at       timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw              jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id         text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin           text NOT NULL,
    synced_at        timestamptz NOT NULL                        -- when the row was written
);

-- lz4 takes a fraction of the time of pglz. A server that was built without it keeps its default.
-- +goose StatementBegin
DO $$
BEGIN
    ALTER TABLE waitlist_entries ALTER COLUMN raw SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
-- +goose StatementEnd
