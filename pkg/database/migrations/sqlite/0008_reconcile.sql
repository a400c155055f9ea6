-- +goose Up
-- The reconciler's own books: what each run looked at and found, and how far it came.
CREATE TABLE reconcile_runs (
    id          text PRIMARY KEY,
    source      text NOT NULL,
    kind        text NOT NULL CHECK (kind IN ('full', 'incremental', 'backfill')),
    dry_run     boolean NOT NULL DEFAULT false,
    status      text NOT NULL CHECK (status IN ('running', 'succeeded', 'stopped', 'failed')),
    stopped     text NOT NULL DEFAULT '',       -- why the run deleted nothing and ended early
    error       text NOT NULL DEFAULT '',
    holder      text NOT NULL,                  -- the process that runs it
    lease_rev   integer NOT NULL,                -- fencing: only the newest holder of the lease may write this row
    started_at  datetime NOT NULL,
    updated_at  datetime NOT NULL,
    finished_at datetime,
    state       text NOT NULL,                 -- checkpoint, a cursor for each resource
    checked     text NOT NULL,                 -- objects of Clerk's looked at, by resource
    missing     integer NOT NULL DEFAULT 0,
    stale       integer NOT NULL DEFAULT 0,
    "different" integer NOT NULL DEFAULT 0,
    extra       integer NOT NULL DEFAULT 0,
    published   integer NOT NULL DEFAULT 0
);
CREATE INDEX reconcile_runs_started ON reconcile_runs (source, started_at);
CREATE TABLE drifts (
    run_id     text NOT NULL REFERENCES reconcile_runs (id) ON DELETE CASCADE,
    resource   text NOT NULL,
    object_id  text NOT NULL,
    drift      text NOT NULL CHECK (drift IN ('missing', 'stale', 'different', 'extra')),
    fields     text NOT NULL,                  -- names of the fields that differ, no values
    event_type text NOT NULL,                   -- the event that had been missed
    event_id   text NOT NULL DEFAULT '',        -- the one published in its place, empty for none
    mirror_version integer NOT NULL,             -- ms, 0 for no row
    clerk_version  integer NOT NULL,             -- ms, 0 for no object
    found_at   datetime NOT NULL,
    PRIMARY KEY (run_id, resource, object_id)
);
CREATE INDEX drifts_object ON drifts (object_id);
-- A full sweep reads the living in the order of their creation, as Clerk's API gives them.
CREATE INDEX users_created ON users (clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX organizations_created ON organizations (clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX organization_memberships_created ON organization_memberships (clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX waitlist_entries_created ON waitlist_entries (clerk_created_at, id) WHERE deleted_at IS NULL;
