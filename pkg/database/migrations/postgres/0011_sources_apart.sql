-- +goose NO TRANSACTION
-- +goose Up
-- An event's id is its sender's to choose, so it names an event only within its source: the key of the delivery log begins there.
-- No column changes, so every row stays where it is. Reading goes on; the worker pauses while the index is built (a million rows: 12 to 25 s
-- on two loaded cores) and resumes by itself. The exchange of the key takes less than 0.2 s.
-- Each statement stands alone: in one transaction the second would want a stronger lock than the first, and a worker that has
-- read and is about to write would be in its way. A run that was interrupted in between is repeated.
DROP INDEX IF EXISTS deliveries_by_source;
CREATE UNIQUE INDEX deliveries_by_source ON deliveries (handler, source, event_id);
ALTER TABLE deliveries DROP CONSTRAINT IF EXISTS deliveries_pkey, ADD CONSTRAINT deliveries_pkey PRIMARY KEY USING INDEX deliveries_by_source;
