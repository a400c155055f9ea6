-- +goose Up
-- A sweep is of one source: with the source in front it reads and counts its living from the index alone.
CREATE INDEX users_source_created ON users (source, clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX organizations_source_created ON organizations (source, clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX organization_memberships_source_created ON organization_memberships (source, clerk_created_at, id) WHERE deleted_at IS NULL;
CREATE INDEX waitlist_entries_source_created ON waitlist_entries (source, clerk_created_at, id) WHERE deleted_at IS NULL;
DROP INDEX users_created;
DROP INDEX organizations_created;
DROP INDEX organization_memberships_created;
DROP INDEX waitlist_entries_created;
