-- +goose Up
-- A sweep is of one source: with the source in front it reads and counts its living from the index alone.
-- Writes to these tables wait until the indexes are built, some five seconds for a million rows: the worker pauses where that takes longer than its
-- lock_timeout, and goes on by itself; ingest writes none of them. CONCURRENTLY would wait for other processes that wait to migrate, and they for it.
CREATE INDEX users_source_created ON users (source, clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX organizations_source_created ON organizations (source, clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX organization_memberships_source_created ON organization_memberships (source, clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX waitlist_entries_source_created ON waitlist_entries (source, clerk_created_at, id) WHERE deleted_at IS NULL;
DROP INDEX users_created;
DROP INDEX organizations_created;
DROP INDEX organization_memberships_created;
DROP INDEX waitlist_entries_created;
