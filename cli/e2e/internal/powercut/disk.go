// Package powercut is a disk in memory that loses what was not synced when its power is cut: bytes that were written and not synced,
// and names that were made, moved or removed in a folder that was not synced. Processes use it through FUSE ([Disk.Mount], Linux, root
// or the right to mount); the disk itself needs nothing of the machine.
//
// A sync of a file also keeps the file's name and the folders above it, as ext4, XFS and btrfs do; it keeps no other name. Owners,
// modes and times are kept at once. The disk does not fail, does not tear a page of 4 KiB, and forgets nothing that was synced.
package powercut

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"
)

const pageSize = 4096

type page = [pageSize]byte

// Disk is a file system in memory. It is safe for concurrent use.
type Disk struct {
	mu    sync.Mutex
	root  *inode
	inos  uint64
	syncs int64
}

// inode is a file, a folder or a symbolic link, as it is now and as it would be found after a power cut.
type inode struct {
	ino          uint64
	mode         uint32 // with the type
	uid, gid     uint32
	atime, mtime time.Time
	target       string // of a symbolic link

	now, kept contents
	dirty     map[int]struct{} // pages in which now and kept may differ

	entries, keptEntries map[string]*inode // of a folder
	links, keptLinks     map[link]struct{} // where the inode is found; the root has none
}

// contents are the bytes of a file. A page that is nil is zero; one that both contents share is never written to.
type contents struct {
	size  int64
	pages []*page
}

type link struct {
	dir  *inode
	name string
}

// NewDisk makes an empty disk.
func NewDisk() *Disk {
	d := &Disk{}
	d.root = d.inode(syscall.S_IFDIR | 0o755)
	return d
}

func (d *Disk) inode(mode uint32) *inode {
	d.inos++
	n := &inode{ino: d.inos, mode: mode, mtime: time.Now(), links: map[link]struct{}{}, keptLinks: map[link]struct{}{}}
	n.atime = n.mtime
	if n.isDir() {
		n.entries, n.keptEntries = map[string]*inode{}, map[string]*inode{}
	} else {
		n.dirty = map[int]struct{}{}
	}
	return n
}

func (n *inode) isDir() bool { return n.mode&syscall.S_IFMT == syscall.S_IFDIR }

// Syncs is how many syncs of files and folders were asked for so far.
func (d *Disk) Syncs() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.syncs
}

// Sync keeps everything as it is now.
func (d *Disk) Sync() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncAll(d.root)
}

func (d *Disk) syncAll(n *inode) {
	n.keep()
	for _, child := range n.entries {
		d.syncAll(child)
	}
}

// Loss is what a power cut does to what was not synced.
type Loss int

// The kinds of loss.
const (
	Everything Loss = iota // nothing that was not synced is there
	Contents               // names are there, contents are not: files of size zero, as ext4 and XFS may leave them
	Some                   // of each file a random beginning of its pages that were not synced is there, of the folders all or nothing
)

func (l Loss) String() string { return [...]string{"everything", "contents", "some"}[l] }

// Cut takes the disk back to what it would hold after a power cut. Its processes must have ended and it must not be mounted.
func (d *Disk) Cut(loss Loss, rng *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if loss == Some {
		d.writeBack(d.root, rng)
	}
	if loss == Contents || loss == Some && rng.IntN(2) == 0 {
		d.keepNames(d.root)
	}
	d.revert(d.root)
}

// writeBack keeps the beginning of what was not synced, as a kernel that was about to write it.
func (d *Disk) writeBack(n *inode, rng *rand.Rand) {
	for _, name := range slices.Sorted(maps.Keys(n.entries)) {
		d.writeBack(n.entries[name], rng)
	}
	if len(n.dirty) == 0 || n.now.size < n.kept.size {
		return
	}
	dirty := slices.Sorted(maps.Keys(n.dirty))
	for _, i := range dirty[:rng.IntN(len(dirty)+1)] {
		n.kept.set(i, n.now.page(i))
		n.kept.size = max(n.kept.size, min(n.now.size, int64(i+1)*pageSize))
	}
}

func (d *Disk) keepNames(n *inode) {
	if !n.isDir() {
		return
	}
	n.keepEntries()
	for _, child := range n.entries {
		d.keepNames(child)
	}
}

// revert makes what is kept what is now.
func (d *Disk) revert(n *inode) {
	if !n.isDir() {
		n.now = contents{size: n.kept.size, pages: slices.Clone(n.kept.pages)}
		clear(n.dirty)
		return
	}
	n.entries = maps.Clone(n.keptEntries)
	for name, child := range n.entries {
		child.links = maps.Clone(child.keptLinks)
		child.links[link{n, name}] = struct{}{}
		d.revert(child)
	}
}

// keep is fsync of one inode.
func (n *inode) keep() {
	if n.isDir() {
		n.keepEntries()
	} else {
		n.keepContents()
	}
	n.keepLinks(true)
}

func (n *inode) keepContents() {
	n.kept.size = n.now.size
	n.kept.pages = n.kept.pages[:min(len(n.kept.pages), len(n.now.pages))]
	for i := range n.dirty {
		if i < len(n.now.pages) {
			n.kept.set(i, n.now.pages[i])
		}
	}
	clear(n.dirty)
}

func (n *inode) keepEntries() {
	changed := map[*inode]struct{}{}
	for name, child := range n.entries {
		if n.keptEntries[name] != child {
			changed[child] = struct{}{}
		}
	}
	for name, child := range n.keptEntries {
		if n.entries[name] != child {
			changed[child] = struct{}{}
		}
	}
	for child := range changed {
		child.keepLinks(false) // a rename between folders is kept whole: in both or in neither
	}
}

// keepLinks keeps all names of the inode as they are now; with above, also those of the folders above it.
func (n *inode) keepLinks(above bool) {
	for l := range n.keptLinks {
		if _, still := n.links[l]; !still {
			if l.dir.keptEntries[l.name] == n {
				delete(l.dir.keptEntries, l.name)
			}
			delete(n.keptLinks, l)
		}
	}
	for l := range n.links {
		if old := l.dir.keptEntries[l.name]; old != nil && old != n {
			delete(old.keptLinks, l)
		}
		l.dir.keptEntries[l.name] = n
		n.keptLinks[l] = struct{}{}
		if above {
			l.dir.keepLinks(true)
		}
	}
}

func (c *contents) page(i int) *page {
	if i < len(c.pages) {
		return c.pages[i]
	}
	return nil
}

func (c *contents) set(i int, p *page) {
	for len(c.pages) <= i {
		c.pages = append(c.pages, nil)
	}
	c.pages[i] = p
}

// own returns a page to write to.
func (n *inode) own(i int) *page {
	p := n.now.page(i)
	if p == nil || p == n.kept.page(i) {
		fresh := &page{}
		if p != nil {
			*fresh = *p
		}
		p = fresh
		n.now.set(i, p)
	}
	n.dirty[i] = struct{}{}
	return p
}

func (n *inode) write(data []byte, off int64) {
	for done := 0; done < len(data); {
		at := off + int64(done)
		done += copy(n.own(int(at / pageSize))[at%pageSize:], data[done:])
	}
	n.now.size = max(n.now.size, off+int64(len(data)))
	n.mtime = time.Now()
}

func (n *inode) read(dest []byte, off int64) []byte {
	if off >= n.now.size {
		return nil
	}
	dest = dest[:min(int64(len(dest)), n.now.size-off)]
	for done := 0; done < len(dest); {
		at := off + int64(done)
		p := n.now.page(int(at / pageSize))
		if p == nil {
			p = &page{}
		}
		done += copy(dest[done:], p[at%pageSize:])
	}
	return dest
}

func (n *inode) truncate(size int64) {
	pages := int((size + pageSize - 1) / pageSize)
	if size < n.now.size {
		for i := pages; i < len(n.now.pages); i++ {
			n.dirty[i] = struct{}{}
		}
		n.now.pages = n.now.pages[:min(len(n.now.pages), pages)]
		if rest := size % pageSize; rest != 0 && n.now.page(pages-1) != nil {
			clear(n.own(pages - 1)[rest:])
		}
	}
	n.now.size = size
	n.mtime = time.Now()
}

func (n *inode) add(name string, child *inode) {
	if old := n.entries[name]; old != nil {
		delete(old.links, link{n, name})
	}
	n.entries[name] = child
	child.links[link{n, name}] = struct{}{}
	n.mtime = time.Now()
}

func (n *inode) remove(name string) {
	if child := n.entries[name]; child != nil {
		delete(child.links, link{n, name})
		delete(n.entries, name)
		n.mtime = time.Now()
	}
}
