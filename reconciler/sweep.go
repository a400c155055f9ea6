package reconciler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"slices"
	"time"

	"github.com/tidwall/gjson"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/usherhq/usher/pkg/clerk"
	"github.com/usherhq/usher/pkg/event"
	"github.com/usherhq/usher/pkg/mirror"
)

// API is what a sweep needs of Clerk's Backend API; see [clerk.Client].
type API interface {
	Pages(ctx context.Context, resource string, order clerk.Order, cursor string) iter.Seq2[clerk.Page, error]
	Find(ctx context.Context, resource, id, organizationID string) (clerk.Object, bool, error)
	Count(ctx context.Context, resource string) (int64, error)
	Tally(ctx context.Context, resource string, newest time.Time) (clerk.Tally, error)
	Latest(ctx context.Context, resource string) (clerk.Object, bool, error)
	Newest(ctx context.Context, resource string) ([]clerk.Object, error)
}

const (
	// overlap is how far an incremental sweep reads beyond the newest change of the last one: changes need not become
	// visible in the order of their times.
	overlap = 5 * time.Minute
	// maxItems bounds the items of a report.
	maxItems = 10_000
	// maxUnknown is how many rows without an object a sweep asks Clerk for before it takes that for an answer.
	maxUnknown = 20_000
	// getters is how many single objects are asked for at once.
	getters = 4
	// looks is how often Clerk is asked for a count that does not fit its pages before that is taken for an answer.
	looks = 3
	// fewUnlisted is how many objects that no page had may be there all the same, of a table that is not large.
	fewUnlisted = 10
	// clockSkew is by how much Clerk's clock may be behind ours.
	clockSkew = time.Minute
)

// Tests have less of both.
var (
	// maxCandidates bounds what waits to be looked at again.
	maxCandidates = 2000
	// maxRereads is how many objects of one table are read again only because they differ. What differs by the thousand is no moment's lag.
	maxRereads = 200
)

// stopError ends a run that must not go on: nothing was deleted.
type stopError string

func (e stopError) Error() string { return string(e) }

// candidate is what may be drift.
type candidate struct {
	object  *object
	row     *row
	verdict verdict
	changed bool // the row, since it was first read
}

// span is the candidates of one page, and where the sweep is once they are settled.
type span struct {
	candidates []*candidate
	readAt     time.Time
	cursor     string // empty for the last page, and where there is none to go on from
	created    int64
	checked    int64
	matched    int64
}

// end is how far the pages of a table go.
type end struct {
	created int64 // ms: when the newest object of them was made; 0 for none, and where they are in no order
	same    int   // objects of that time
	began   time.Time
}

func (e *end) reach(created int64) {
	if created > e.created {
		e.created, e.same = created, 0
	}
	if created == e.created {
		e.same++
	}
}

// beyond tells whether an object was made after the last page, so that none can have it.
func (e *end) beyond(created int64) bool {
	if e.created == 0 {
		return created > e.began.Add(-clockSkew).UnixMilli()
	}
	return created > e.created
}

// sweep is one run over some tables. One goroutine uses it.
type sweep struct {
	*Sweeper
	opts   Options
	origin event.Origin
	report *Report
	state  *state
	last   map[string]*progress            // what the last successful runs noted of each table
	save   func(ctx context.Context) error // the checkpoint; nil for none
	record func(ctx context.Context, drifts []drift) error

	table   string
	at      *progress
	queue   []span
	waiting int                 // candidates in queue
	met     map[string]struct{} // rows that were found by their id only
	rereads int
	sifted  int // of at.Unmatched, see sift
	// tail is of the pages behind the last cursor. A run that is taken up reads them again, so they are not in the checkpoint.
	tail struct{ checked, matched int64 }
	from int64 // ms: the time of creation at which this process began; 0 for the beginning
	end  end
	// lacking is how many objects are there that the pages should have had.
	lacking int64
	// lastRead is when the last page was read, saved when the last checkpoint was made.
	lastRead, saved time.Time
	room            room
}

// run sweeps the tables that are not done yet, and then deletes what is gone.
func (w *sweep) run(ctx context.Context) error {
	w.saved = time.Now()
	defer func() {
		for _, table := range w.state.Resources {
			if w.state.of(table).Absent {
				w.report.Absent = append(w.report.Absent, table)
			}
		}
	}()
	if err := w.known(ctx); err != nil {
		return err
	}
	var failures []error // of tables, which are left as they are
	for _, table := range w.state.Resources {
		w.table, w.at = table, w.state.of(table)
		w.queue, w.waiting, w.met, w.rereads, w.sifted = nil, 0, map[string]struct{}{}, 0, 0
		w.tail.checked, w.tail.matched, w.from = 0, 0, w.at.Created
		w.end, w.lacking = end{created: w.at.Created, began: time.Now()}, 0
		if w.at.Done {
			continue
		}
		sweepTable := w.full
		if w.opts.Kind == Incremental {
			sweepTable = w.incremental
		}
		err := sweepTable(ctx)
		if clerk.Optional(table) && errors.Is(err, clerk.ErrNotEnabled) {
			w.skip()
			err = nil
		}
		if err != nil {
			err = fmt.Errorf("sweep %s: %w", table, err)
		}
		if ctx.Err() == nil && (errors.Is(err, clerk.ErrUnreadable) || errors.Is(err, clerk.ErrNotFound)) {
			w.fail(err)
			failures = append(failures, err)
			continue
		}
		if err != nil {
			return joined(failures, err)
		}
		w.at.Checked, w.at.Matched = w.checked(), w.matched()
		w.tail.checked, w.tail.matched = 0, 0
		w.report.Checked[table] = w.at.Checked
		w.at.Done, w.at.Cursor, w.at.Unmatched = true, "", nil
		if err := w.checkpoint(ctx); err != nil {
			return joined(failures, err)
		}
	}
	return joined(failures, w.remove(ctx))
}

// joined is the errors of tables and that of the run. One alone stays what it is, and a stop goes before all: what failed is in the report.
func joined(failures []error, err error) error {
	var stop stopError
	if len(failures) == 0 || errors.As(err, &stop) {
		return err
	}
	return errors.Join(append(failures, err)...)
}

// fail notes that a table cannot be compared, for a reason of its own. Nothing of it is deleted, and the others are swept.
func (w *sweep) fail(err error) {
	w.at.Gone = nil
	delete(w.report.Checked, w.table)
	if w.report.Failed == nil {
		w.report.Failed = map[string]string{}
	}
	w.report.Failed[w.table] = err.Error()
	w.log.Error("resource not compared", zap.String("resource", w.table), zap.Error(err))
}

// skip takes a table for done whose feature the instance does without. Its rows stay as they are: an object that nobody can read
// need not be gone.
func (w *sweep) skip() {
	*w.at = progress{Absent: true, Done: true}
	w.tail.checked, w.tail.matched, w.report.Checked[w.table] = 0, 0, 0
	if last := w.last[w.table]; last == nil || !last.Absent { // said once, not by every run
		w.log.Info("Clerk has not enabled this resource in the instance: not compared", zap.String("resource", w.table))
	}
}

func (w *sweep) checked() int64 { return w.at.Checked + w.tail.checked }

func (w *sweep) matched() int64 { return w.at.Matched + w.tail.matched }

func (w *sweep) progress(waiting int64) {
	if w.opts.Progress != nil {
		w.opts.Progress(Progress{Resource: w.table, Done: w.checked(), Total: w.at.Total, Waiting: waiting})
	}
}

func (w *sweep) checkpoint(ctx context.Context) error {
	w.saved = time.Now()
	if w.save == nil {
		return nil
	}
	return w.save(ctx)
}

// known stops a run against another instance before it publishes anything of it: of the oldest and the newest users
// of the mirror, Clerk must know one, whatever the run is about.
func (w *sweep) known(ctx context.Context) error {
	if w.opts.Force {
		return nil
	}
	const table, each, enough = "users", 3, 3
	ids, err := w.books.ends(ctx, table, each)
	if err != nil {
		return err
	}
	if slices.Sort(ids); len(slices.Compact(slices.Clone(ids))) < enough {
		return nil
	}
	for _, id := range ids {
		_, there, err := w.api.Find(ctx, table, id, "")
		if err != nil {
			return err
		}
		if there {
			return nil
		}
	}
	return stopError(fmt.Sprintf("Clerk knows none of %d users of the mirror: is CLERK_SECRET_KEY that of another instance?", len(ids)))
}

// full sweeps one table whole.
func (w *sweep) full(ctx context.Context) error {
	if w.at.Cursor == "" {
		w.restart() // of what was seen without a cursor to go on from, all is seen again
	}
	if w.at.Cursor == "" || w.at.Total == 0 { // else it is of what the pages began with
		n, err := w.api.Count(ctx, w.table)
		if err != nil {
			return fmt.Errorf("count: %w", err)
		}
		w.at.Total = n
	}
	before := w.at.Total
	if err := w.head(ctx); err != nil {
		return err
	}
	pages := w.keyed
	if clerk.Sorted(w.table, clerk.Created) {
		pages = w.merged
	}
	if err := pages(ctx); err != nil {
		return err
	}
	if err := w.drain(ctx, true); err != nil {
		return err
	}
	after, err := w.counted(ctx, before)
	if err != nil {
		return err
	}
	w.at.Count = after
	if err := w.extras(ctx); err != nil {
		return err
	}
	// What the mirror will have once all is applied. A difference that remains has a reason that a sweep cannot take away; what came
	// and went meanwhile is none.
	seen := w.checked() + w.at.Unlisted
	w.at.Rows = after + seen - min(max(seen, min(before, after)), max(before, after)) - w.at.Defeated
	return nil
}

// counted asks for the count after the pages, and stops the run where it does not fit them and that of before: when an object was in
// the list all the time, a page had it.
func (w *sweep) counted(ctx context.Context, before int64) (int64, error) {
	for look := 1; ; look++ {
		after, err := w.api.Count(ctx, w.table)
		if err != nil {
			return 0, fmt.Errorf("count: %w", err)
		}
		if w.opts.Force || clerk.Partial(w.table) {
			return after, nil
		}
		fits, err := w.fits(ctx, before, after)
		if err != nil || fits {
			return after, err
		}
		if look == looks {
			return 0, stopError(fmt.Sprintf("%s: Clerk counts %d and its pages had %d: nothing was deleted", w.table, after, w.checked()))
		}
		if err := sleep(ctx, w.cfg.Pause); err != nil { // a count may be behind
			return 0, err
		}
	}
}

// fits tells whether what was swept is what Clerk counts. The pages have all that are there at their end, and some that left while they were
// read. They may lack what came after them, and as many as the count moved by; they may have what left, and a few more, since
// others may have come for those.
func (w *sweep) fits(ctx context.Context, before, after int64) (bool, error) {
	seen, moved, high := w.checked(), max(before-after, after-before), max(before, after)
	if seen > high+max(3, high/100) {
		return false, nil
	}
	if seen+moved >= after {
		return true, nil
	}
	newest, err := w.api.Newest(ctx, w.table)
	if err != nil {
		return false, fmt.Errorf("count: %w", err)
	}
	late := 0
	for i := range newest {
		if created := event.Millis(newest[i].CreatedAt); w.end.beyond(created) || created == w.end.created {
			late++
		}
	}
	return seen+moved+int64(max(0, late-w.end.same)) >= after, nil
}

// head notes the newest change before the sweep, from which the next incremental one goes on.
func (w *sweep) head(ctx context.Context) error {
	if !clerk.Sorted(w.table, clerk.Updated) || w.at.Watermark != 0 {
		return nil
	}
	o, _, err := w.api.Latest(ctx, w.table)
	if err != nil {
		return err
	}
	w.at.Watermark = past(o.UpdatedAt)
	return nil
}

// past is a time of Clerk's in ms, or now where that is not yet: a watermark in the future would hide all changes until then.
func past(at int64) int64 { return min(event.Millis(at), time.Now().UnixMilli()) }

// merged compares in the order of creation.
func (w *sweep) merged(ctx context.Context) error {
	current := span{}
	// Pages of both are read ahead, while the last ones are compared. All else happens in this goroutine.
	pages, stop := ahead(ctx, w.api.Pages(ctx, w.table, clerk.Created, w.at.Cursor))
	defer stop()
	objects := func(yield func(object, error) bool) {
		for page, err := range pages {
			if err != nil {
				yield(object{}, err)
				return
			}
			current = span{readAt: page.ReadAt, cursor: page.Cursor}
			for _, o := range page.Objects {
				current.created = event.Millis(o.CreatedAt)
				w.end.reach(current.created)
				if !yield(object{o, page.ReadAt}, nil) {
					return
				}
			}
			current.checked = int64(len(page.Objects))
			if err := w.push(ctx, current); err != nil {
				yield(object{}, err)
				return
			}
			current = span{}
		}
	}
	rows, stopRows := ahead(ctx, w.books.livingPages(ctx, w.table, w.at.Created))
	defer stopRows()
	err := merge(objects, flat(rows), func(o *object, r *row) error {
		switch {
		case o == nil:
			return w.unmatched(ctx, r.id)
		case r != nil:
			current.matched++
		}
		if v := compare(w.table, o, r); v.open() {
			current.candidates = append(current.candidates, &candidate{object: o, row: r, verdict: v})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := w.drain(ctx, true); err != nil {
		return err
	}
	for r, err := range w.books.heads(ctx, w.table, true) {
		if err != nil {
			return err
		}
		if _, met := w.met[r.id]; !met {
			if err := w.unmatched(ctx, r.id); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *sweep) unmatched(ctx context.Context, id string) error {
	if len(w.at.Unmatched) >= w.sifted+rowPage {
		if err := w.sift(ctx); err != nil {
			return err
		}
	}
	if w.opts.Force || w.opts.Kind == verification || len(w.at.Unmatched) <= maxUnknown {
		w.at.Unmatched = append(w.at.Unmatched, id)
	}
	return nil
}

// sift takes the children of what this run found gone out of the rows without an object: they go with their parents, so they are no
// extras of their own, however many they are.
func (w *sweep) sift(ctx context.Context) error {
	gone := map[string]map[string]bool{}
	for parent := range mirror.Parents(w.table) {
		gone[parent] = map[string]bool{}
		for _, g := range w.state.of(parent).Gone {
			gone[parent][g.ID] = true
		}
	}
	children, err := w.books.childrenOf(ctx, w.table, w.at.Unmatched[w.sifted:], gone)
	if err != nil {
		return err
	}
	w.at.Unmatched = slices.DeleteFunc(w.at.Unmatched, func(id string) bool { return children[id] })
	w.sifted = len(w.at.Unmatched)
	return nil
}

// keyed compares by id, for objects that come in no order. It remembers a hash of each id, 8 bytes an object, and is not resumed within
// the table.
func (w *sweep) keyed(ctx context.Context) error {
	seen := map[uint64]struct{}{}
	for page, err := range w.api.Pages(ctx, w.table, clerk.Created, "") {
		if err != nil {
			return err
		}
		for _, o := range page.Objects {
			seen[maphash.String(seed, o.ID)] = struct{}{}
		}
		if err := w.page(ctx, page); err != nil {
			return err
		}
	}
	for r, err := range w.books.heads(ctx, w.table, false) {
		if err != nil {
			return err
		}
		if _, there := seen[maphash.String(seed, r.id)]; !there {
			if err := w.unmatched(ctx, r.id); err != nil {
				return err
			}
		}
	}
	return nil
}

// page compares the objects of one page with the rows of their ids.
func (w *sweep) page(ctx context.Context, page clerk.Page) error {
	ids := make([]string, len(page.Objects))
	for i, o := range page.Objects {
		ids[i] = o.ID
	}
	rows, err := w.books.byID(ctx, w.table, ids)
	if err != nil {
		return err
	}
	s := span{readAt: page.ReadAt, checked: int64(len(page.Objects))}
	for _, o := range page.Objects {
		read := &object{o, page.ReadAt}
		r := rows[o.ID]
		if r != nil {
			s.matched++
		}
		if v := compare(w.table, read, r); v.open() {
			s.candidates = append(s.candidates, &candidate{object: read, row: r, verdict: v})
		}
	}
	return w.push(ctx, s)
}

// incremental reads the newest changes down to where the last run began. What has no such order is counted, and swept whole
// where Clerk's count and the mirror's no longer differ by what they did.
func (w *sweep) incremental(ctx context.Context) error {
	last := w.last[w.table]
	if !last.Done || last.Absent || w.at.Cursor != "" {
		return w.full(ctx) // there is nothing yet to go on from, or it was cut off in the midst of sweeping whole
	}
	if clerk.Sorted(w.table, clerk.Updated) && last.Watermark != 0 {
		if err := w.changes(ctx, last.Watermark-overlap.Milliseconds()); err != nil {
			return err
		}
		if err := w.drain(ctx, true); err != nil {
			return err
		}
	}
	if w.at.Watermark == 0 {
		w.at.Watermark = last.Watermark
	}
	now, err := w.sample(ctx)
	if err != nil {
		return err
	}
	w.at.Count, w.at.Rows = now.All, now.rows
	if now.all(last) == 0 && now.old(last) == 0 {
		return nil
	}
	return w.differ(ctx, last, now)
}

// restart forgets what was compared of the table.
func (w *sweep) restart() {
	w.at.Cursor, w.at.Created, w.at.Checked, w.at.Matched, w.at.Unmatched = "", 0, 0, 0, nil
	w.at.Unlisted, w.at.Defeated, w.at.Apart, w.at.Gone = 0, 0, 0, nil
	w.tail.checked, w.tail.matched, w.from = 0, 0, 0
	w.end, w.lacking, w.sifted = end{began: time.Now()}, 0, 0
}

func (w *sweep) changes(ctx context.Context, since int64) error {
	first := true
	for page, err := range w.api.Pages(ctx, w.table, clerk.Updated, "") {
		if err != nil {
			return err
		}
		if len(page.Objects) == 0 {
			return nil
		}
		if first {
			w.at.Watermark, first = past(page.Objects[0].UpdatedAt), false
		}
		oldest := event.Millis(page.Objects[len(page.Objects)-1].UpdatedAt)
		n := 0
		for n < len(page.Objects) && event.Millis(page.Objects[n].UpdatedAt) >= since {
			n++
		}
		page.Objects = page.Objects[:n]
		if err := w.page(ctx, page); err != nil {
			return err
		}
		if oldest < since {
			return nil
		}
	}
	return nil
}

// filling tells whether this is a backfill, or the first sweep of a source, which is one in effect.
func (w *sweep) filling() bool { return w.origin == event.OriginBackfill }

// push queues the candidates of a page and settles those that have waited long enough.
func (w *sweep) push(ctx context.Context, s span) error {
	w.queue, w.lastRead = append(w.queue, s), s.readAt
	w.waiting += len(s.candidates)
	return w.drain(ctx, false)
}

// drain settles the pages that were read at least a pause ago, so that what was on its way has arrived; all of them, where asked to
// or where too many wait.
func (w *sweep) drain(ctx context.Context, all bool) error {
	pause := w.cfg.Pause
	if w.filling() {
		pause = 0 // nothing is there to lag behind
	}
	for len(w.queue) > 0 {
		n, candidates := 0, []*candidate{}
		for n < len(w.queue) && (n == 0 || len(candidates) < rowPage) && (all || w.waiting > maxCandidates || time.Since(w.queue[n].readAt) >= pause || len(w.queue[n].candidates) == 0) {
			candidates = append(candidates, w.queue[n].candidates...)
			n++
		}
		if n == 0 {
			return nil
		}
		last := w.queue[n-1]
		if len(candidates) > 0 {
			if err := sleep(ctx, pause-time.Since(last.readAt)); err != nil {
				return err
			}
			for chunk := range slices.Chunk(candidates, rowPage) {
				if err := w.settle(ctx, chunk); err != nil {
					return err
				}
			}
		}
		for _, s := range w.queue[:n] {
			if s.cursor != "" {
				w.at.Cursor, w.at.Created = s.cursor, s.created
				w.at.Checked, w.at.Matched = w.at.Checked+s.checked, w.at.Matched+s.matched
			} else {
				w.tail.checked, w.tail.matched = w.tail.checked+s.checked, w.tail.matched+s.matched
			}
		}
		w.waiting -= len(candidates)
		w.queue = slices.Delete(w.queue, 0, n)
		w.report.Checked[w.table] = w.checked()
		w.progress(0)
		if time.Since(w.saved) >= w.cfg.Checkpoint {
			if err := w.checkpoint(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// settle looks at candidates again, and counts and publishes what is still drift: rows that changed meanwhile, and
// objects whose event is on its way, are not. A verification waits for what is on its way, within its rechecks.
func (w *sweep) settle(ctx context.Context, candidates []*candidate) error {
	var result []*candidate
	for round := 1; len(candidates) > 0; round++ {
		left, err := w.again(ctx, candidates, w.opts.Kind == verification)
		if err != nil {
			return err
		}
		landed, err := w.landed(ctx, left)
		if err != nil {
			return err
		}
		result = append(result, landed...)
		candidates = without(left, landed)
		if w.opts.Kind != verification || round >= w.cfg.Rechecks || len(candidates) == 0 {
			break
		}
		if err := sleep(ctx, w.cfg.Pause); err != nil {
			return err
		}
	}
	return w.found(ctx, result)
}

// without are the candidates that are not among others.
func without(candidates, others []*candidate) []*candidate {
	return slices.DeleteFunc(slices.Clone(candidates), func(c *candidate) bool { return slices.Contains(others, c) })
}

// again reads the rows anew, and some objects (all, where they are few) for which the row is no explanation, and returns what still differs.
func (w *sweep) again(ctx context.Context, candidates []*candidate, all bool) ([]*candidate, error) {
	left, err := w.reread(ctx, candidates)
	if err != nil {
		return nil, err
	}
	var ask []*candidate
	for _, c := range left {
		switch {
		case c.verdict.defeated, c.changed:
			ask = append(ask, c)
		case c.verdict.held && w.rereads < maxRereads, (all || c.verdict.drift == Different) && clerk.Addressable(w.table) && w.rereads < maxRereads:
			w.rereads++
			ask = append(ask, c)
		}
	}
	if len(ask) == 0 {
		return left, nil
	}
	gone, err := w.ask(ctx, ask)
	if err != nil {
		return nil, err
	}
	left = slices.DeleteFunc(left, func(c *candidate) bool { return gone[c] })
	return w.reread(ctx, left)
}

// reread compares with the rows as they are now.
func (w *sweep) reread(ctx context.Context, candidates []*candidate) ([]*candidate, error) {
	ids := make([]string, len(candidates))
	for i, c := range candidates {
		ids[i] = c.object.ID
	}
	rows, err := w.books.byID(ctx, w.table, ids)
	if err != nil {
		return nil, err
	}
	var left []*candidate
	for _, c := range candidates {
		r := rows[c.object.ID]
		if r != nil {
			if c.row == nil {
				w.met[r.id] = struct{}{}
			} else if c.row.version != r.version || c.row.seenAt != r.seenAt || c.row.deleted != r.deleted {
				c.changed = true
			}
		}
		c.row, c.verdict = r, compare(w.table, c.object, r)
		if c.verdict.open() {
			left = append(left, c)
		}
	}
	return left, nil
}

// ask reads the objects of candidates anew and tells which of them are gone.
func (w *sweep) ask(ctx context.Context, candidates []*candidate) (map[*candidate]bool, error) {
	gone := make([]bool, len(candidates))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(getters)
	for i, c := range candidates {
		group.Go(func() error {
			began := time.Now()
			o, there, err := w.api.Find(ctx, w.table, c.object.ID, organizationOf(c))
			if err != nil {
				return err
			}
			if gone[i] = !there; there {
				c.object = &object{o, began}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err //nolint:wrapcheck // wrapped in the group
	}
	result := map[*candidate]bool{}
	for i, c := range candidates {
		if gone[i] {
			result[c] = true
		}
	}
	return result, nil
}

// organizationOf is the organization whose list an object of no address of its own must be in, empty for none.
func organizationOf(c *candidate) string {
	raw := []byte(c.object.Raw)
	if len(raw) == 0 && c.row != nil {
		raw = []byte(c.row.raw)
	}
	return cmp.Or(gjson.GetBytes(raw, "organization.id").Str, gjson.GetBytes(raw, "organization_id").Str)
}

// extras finds the rows for which Clerk has no object, after asking for each, and stops the run where they are not few.
func (w *sweep) extras(ctx context.Context) error {
	if err := w.sift(ctx); err != nil {
		return err
	}
	ids := w.at.Unmatched
	slices.Sort(ids)
	ids = slices.DeleteFunc(slices.Compact(ids), func(id string) bool { _, met := w.met[id]; return met })
	w.at.Unlisted, w.at.Gone = 0, nil
	if clerk.Partial(w.table) { // the list proves nothing about them
		w.at.Unlisted = int64(len(ids))
		return nil
	}
	if len(ids) == 0 {
		return nil
	}
	rows := w.matched() + int64(len(ids))
	limit := w.cfg.limit(rows)
	if w.opts.Force || w.opts.Kind == verification {
		limit = int64(len(ids))
	}
	if len(ids) > maxUnknown && !w.opts.Force && w.opts.Kind != verification {
		return stopError(fmt.Sprintf("%s: more than %d of %d rows are not in Clerk's pages: nothing was deleted", w.table, maxUnknown, rows))
	}
	for chunk := range slices.Chunk(ids, 100) {
		confirmed, err := w.confirm(ctx, chunk)
		if err != nil {
			return err
		}
		for _, c := range confirmed {
			w.at.Gone = append(w.at.Gone, gone{ID: c.object.ID, At: c.object.readAt.UnixMilli()})
		}
		if w.lacking > max(min(fewUnlisted, rows/2), rows/100) {
			lacking := w.lacking
			w.restart() // its pages are to be read again
			return fmt.Errorf("the list lacks %d objects that exist, of the first that were asked for: %w", lacking, clerk.ErrUnreadable)
		}
		if int64(len(w.at.Gone)) > limit {
			return stopError(fmt.Sprintf("%s: at least %d of %d rows are unknown to Clerk, more than the %d that may be deleted unasked: nothing was deleted (a wrong key looks just like that; --force deletes them)",
				w.table, len(w.at.Gone), rows, limit))
		}
	}
	if len(w.at.Gone) > 0 && w.matched()+w.at.Unlisted == 0 && rows > 1 && !w.opts.Force && w.opts.Kind != verification && w.checked() > 0 {
		return stopError(fmt.Sprintf("%s: Clerk knows none of the %d rows: nothing was deleted (a wrong key looks just like that; --force deletes them)", w.table, rows))
	}
	return nil
}

// remove deletes what extras found in all tables. Nothing goes before every table has shown that few do: a wrong key or instance
// may look right for a while.
func (w *sweep) remove(ctx context.Context) error {
	for _, table := range w.state.Resources {
		w.table, w.at = table, w.state.of(table)
		if clerk.Partial(table) {
			w.at.Gone = nil // of a run that an older version began
		}
		if len(w.at.Gone) > 0 && w.opts.Kind == verification { // a delete may be on its way, and is then no drift
			if err := sleep(ctx, w.cfg.Pause-time.Since(w.lastRead)); err != nil {
				return err
			}
		}
		if len(w.at.Gone) > 0 && clerk.Optional(table) {
			// Where the feature was switched off since the table was compared, Clerk knew none of its objects.
			if _, err := w.api.Count(ctx, table); errors.Is(err, clerk.ErrNotEnabled) {
				w.skip()
			} else if err != nil {
				return fmt.Errorf("count: %w", err)
			}
		}
		for len(w.at.Gone) > 0 {
			n := min(len(w.at.Gone), rowPage)
			candidates := make([]*candidate, n)
			for i, g := range w.at.Gone[:n] {
				candidates[i] = &candidate{object: &object{clerk.Object{ID: g.ID}, time.UnixMilli(g.At)}, verdict: verdict{drift: Extra}}
			}
			if err := w.removePage(ctx, candidates); err != nil {
				return err
			}
			w.at.Gone = w.at.Gone[n:]
		}
	}
	return nil
}

// removePage settles rows whose objects are gone.
func (w *sweep) removePage(ctx context.Context, candidates []*candidate) error {
	var result []*candidate
	for round := 1; len(candidates) > 0; round++ {
		left, err := w.stillLiving(ctx, candidates)
		if err != nil {
			return err
		}
		landed, err := w.landed(ctx, left)
		if err != nil {
			return err
		}
		result = append(result, landed...)
		candidates = without(left, landed)
		if w.opts.Kind != verification || round >= w.cfg.Rechecks || len(candidates) == 0 {
			break
		}
		if err := sleep(ctx, w.cfg.Pause); err != nil {
			return err
		}
	}
	return w.found(ctx, result)
}

// confirm asks Clerk for the object of each living row and returns those for which it says that there is none.
func (w *sweep) confirm(ctx context.Context, ids []string) ([]*candidate, error) {
	rows, err := w.books.byID(ctx, w.table, ids)
	if err != nil {
		return nil, err
	}
	var asked []*candidate
	for _, id := range ids {
		if r := rows[id]; r != nil && !r.deleted {
			asked = append(asked, &candidate{object: &object{Object: clerk.Object{ID: id}, readAt: time.Now()}, row: r})
		}
	}
	gone, err := w.ask(ctx, asked)
	if err != nil {
		return nil, err
	}
	var confirmed, there []*candidate
	for _, c := range asked {
		if gone[c] {
			c.verdict = verdict{drift: Extra}
			confirmed = append(confirmed, c)
			continue
		}
		// Where this process began, rows of that millisecond stand beside pages that the one before it has read.
		if w.from == 0 || c.row.created != w.from {
			w.at.Unlisted++
			if !w.end.beyond(event.Millis(c.object.CreatedAt)) {
				w.lacking++
			}
		}
		if c.verdict = compare(w.table, c.object, c.row); c.verdict.open() {
			there = append(there, c)
		}
	}
	if len(there) == 0 {
		return confirmed, nil
	}
	return confirmed, w.settle(ctx, there)
}

func (w *sweep) stillLiving(ctx context.Context, candidates []*candidate) ([]*candidate, error) {
	ids := make([]string, len(candidates))
	for i, c := range candidates {
		ids[i] = c.object.ID
	}
	rows, err := w.books.byID(ctx, w.table, ids)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(candidates, func(c *candidate) bool {
		r := rows[c.object.ID]
		if r == nil || r.deleted {
			return true
		}
		c.row = r
		return false
	}), nil
}

// found counts, records and publishes drift.
func (w *sweep) found(ctx context.Context, candidates []*candidate) error {
	var drifts []drift
	for _, c := range candidates {
		if c.verdict.defeated {
			// It lives at Clerk, and was just read: a delete was announced that did not happen.
			c.verdict.drift = Missing
		}
		if c.verdict.held {
			c.verdict.drift = Different
		}
		if c.verdict.foreign { // this source has no row of it
			c.verdict.drift = Missing
		}
		drifts = append(drifts, w.driftOf(c))
	}
	if len(drifts) == 0 {
		return nil
	}
	if w.opts.publishes() {
		if err := w.publish(ctx, drifts); err != nil {
			return err
		}
	}
	for i := range drifts {
		d := &drifts[i]
		w.report.Drift.add(d.drift)
		if d.defeated || d.foreign {
			w.at.Defeated++
		}
		item := Item{Resource: w.table, ID: d.id, Drift: d.drift, EventType: string(d.event.Type), EventID: d.eventID, HeldBack: d.heldBack(), Fields: d.fields}
		switch item.HeldBack {
		case HeldByDelete:
			w.report.HeldBack.ByDelete++
		case HeldByVersion:
			w.report.HeldBack.ByVersion++
		case HeldBySource:
			w.report.HeldBack.BySource++
		}
		if len(w.report.Items) < maxItems {
			w.report.Items = append(w.report.Items, item)
		}
		if w.opts.Kind == verification {
			continue
		}
		if w.filling() && d.drift == Missing {
			continue // what a backfill is for
		}
		w.metrics.drift.WithLabelValues(w.table, string(d.drift)).Inc()
		w.log.Warn("drift found", zap.String("resource", w.table), zap.String("drift", string(d.drift)), zap.String("object_id", d.id),
			zap.String("event_type", string(d.event.Type)), zap.String("event_id", d.eventID), zap.String("origin", string(w.origin)), zap.String("held_back", string(item.HeldBack)))
	}
	if w.record != nil {
		return w.record(ctx, drifts)
	}
	return nil
}

// flat are the elements of pages, one by one.
func flat[T any](pages iter.Seq2[[]T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for page, err := range pages {
			if err != nil {
				yield(*new(T), err)
				return
			}
			for i := range page {
				if !yield(page[i], nil) {
					return
				}
			}
		}
	}
}

// ahead pulls one element ahead of its reader, in a goroutine that ends with stop.
func ahead[T any](ctx context.Context, seq iter.Seq2[T, error]) (iter.Seq2[T, error], func()) {
	type element struct {
		value T
		err   error
	}
	ctx, cancel := context.WithCancel(ctx)
	elements, done := make(chan element), make(chan struct{})
	go func() {
		defer close(done)
		defer close(elements)
		for value, err := range seq {
			select {
			case elements <- element{value, err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	stop := func() {
		cancel()
		<-done
	}
	return func(yield func(T, error) bool) {
		for e := range elements {
			if !yield(e.value, e.err) {
				return
			}
		}
		if err := context.Cause(ctx); err != nil { // else the end of the context looks like the end of the pages
			yield(*new(T), err)
		}
	}, stop
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return context.Cause(ctx) //nolint:wrapcheck // says why
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx) //nolint:wrapcheck // says why
	}
}

// limit is how many of so many rows may be deleted without --force: of a small table half at most, but one always.
func (c SweepConfig) limit(rows int64) int64 {
	return min(int64(c.ExtraMax), max(min(int64(c.ExtraMin), max(1, rows/2)), int64(float64(rows)*c.ExtraShare)))
}

func (o Options) publishes() bool { return o.Kind != verification && !o.DryRun }

func (c SweepConfig) withDefaults() SweepConfig {
	c.ExtraShare = cmp.Or(c.ExtraShare, 0.05)
	c.ExtraMax = cmp.Or(c.ExtraMax, 100)
	c.ExtraMin = cmp.Or(c.ExtraMin, 3)
	c.Pause = cmp.Or(c.Pause, 2*time.Second)
	c.Rechecks = cmp.Or(c.Rechecks, 3)
	c.Checkpoint = cmp.Or(c.Checkpoint, 2*time.Second)
	c.LeaseTTL = cmp.Or(c.LeaseTTL, 8*time.Second)
	c.MaxPending = cmp.Or(c.MaxPending, 50_000)
	return c
}
