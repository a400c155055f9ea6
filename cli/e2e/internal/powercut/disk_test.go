package powercut

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// touch makes a file in a folder.
func (d *Disk) touch(dir *inode, name, text string) *inode {
	f := d.inode(syscall.S_IFREG | 0o600)
	dir.add(name, f)
	f.write([]byte(text), 0)
	return f
}

func (d *Disk) mkdir(dir *inode, name string) *inode {
	n := d.inode(syscall.S_IFDIR | 0o700)
	dir.add(name, n)
	return n
}

// tree is everything on the disk: path=text of files, path/ of folders.
func (d *Disk) tree() []string {
	var all []string
	var walk func(path string, n *inode)
	walk = func(path string, n *inode) {
		for name, child := range n.entries {
			if child.isDir() {
				all = append(all, path+name+"/")
				walk(path+name+"/", child)
				continue
			}
			all = append(all, fmt.Sprintf("%s%s=%s", path, name, child.read(make([]byte, child.now.size), 0)))
		}
	}
	walk("", d.root)
	slices.Sort(all)
	return all
}

func TestWhatWasNotSyncedIsLost(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		do   func(d *Disk)
		loss Loss
		want []string
	}{
		"written":              {do: func(d *Disk) { d.touch(d.root, "a", "1") }},
		"name without content": {do: func(d *Disk) { d.touch(d.root, "a", "1"); d.root.keep() }, want: []string{"a="}},
		"file with its name and folders": {do: func(d *Disk) {
			dir := d.mkdir(d.mkdir(d.root, "x"), "y")
			d.touch(dir, "other", "2")
			d.touch(dir, "a", "1").keep()
		}, want: []string{"x/", "x/y/", "x/y/a=1"}},
		"written after the sync": {do: func(d *Disk) {
			f := d.touch(d.root, "a", "1234")
			f.keep()
			f.write([]byte("56"), 2)
			f.write([]byte("more"), 4)
		}, want: []string{"a=1234"}},
		"written after the sync and synced": {do: func(d *Disk) {
			f := d.touch(d.root, "a", "1234")
			f.keep()
			f.write([]byte("56more"), 2)
			f.keep()
		}, want: []string{"a=1256more"}},
		"truncated": {do: func(d *Disk) {
			f := d.touch(d.root, "a", "1234")
			f.keep()
			f.truncate(1)
		}, want: []string{"a=1234"}},
		"truncated, enlarged and synced": {do: func(d *Disk) {
			f := d.touch(d.root, "a", "1234")
			f.keep()
			f.truncate(1)
			f.truncate(3)
			f.keep()
		}, want: []string{"a=1\x00\x00"}},
		"removed": {do: func(d *Disk) {
			d.touch(d.root, "a", "1").keep()
			d.root.remove("a")
		}, want: []string{"a=1"}},
		"removed, folder synced": {do: func(d *Disk) {
			d.touch(d.root, "a", "1").keep()
			d.root.remove("a")
			d.root.keep()
		}},
		"renamed over another": {do: func(d *Disk) {
			d.touch(d.root, "a", "old").keep()
			f := d.touch(d.root, "b", "new")
			f.keep()
			d.root.remove("b")
			d.root.add("a", f)
		}, want: []string{"a=old", "b=new"}},
		"renamed over another, folder synced": {do: func(d *Disk) {
			d.touch(d.root, "a", "old").keep()
			f := d.touch(d.root, "b", "new")
			f.keep()
			d.root.remove("b")
			d.root.add("a", f)
			d.root.keep()
		}, want: []string{"a=new"}},
		"moved, one of the folders synced": {do: func(d *Disk) {
			x, y := d.mkdir(d.root, "x"), d.mkdir(d.root, "y")
			f := d.touch(x, "a", "1")
			f.keep()
			y.keep()
			x.remove("a")
			y.add("a", f)
			x.keep()
		}, want: []string{"x/", "y/", "y/a=1"}},
		"names alone survive": {do: func(d *Disk) {
			d.touch(d.mkdir(d.root, "x"), "a", "1")
		}, loss: Contents, want: []string{"x/", "x/a="}},
		"the whole disk synced": {do: func(d *Disk) {
			d.touch(d.mkdir(d.root, "x"), "a", "1")
			d.Sync()
		}, want: []string{"x/", "x/a=1"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := NewDisk()
			test.do(d)
			for range 2 { // a second cut finds nothing more to take
				d.Cut(test.loss, nil)
				assert.Equal(t, test.want, d.tree())
			}
		})
	}
}

func TestABeginningOfWhatWasNotSyncedMaySurvive(t *testing.T) {
	t.Parallel()
	seen := map[int]bool{}
	for seed := range uint64(100) {
		d := NewDisk()
		f := d.touch(d.root, "a", strings.Repeat("1", 2*pageSize))
		f.keep()
		f.write([]byte(strings.Repeat("2", 3*pageSize)), pageSize)
		d.Cut(Some, rand.New(rand.NewPCG(seed, 0)))
		text := string(d.root.entries["a"].read(make([]byte, 5*pageSize), 0))
		written := strings.Count(text, "2")
		old := strings.Repeat("1", 2*pageSize)
		want := old[:pageSize] + strings.Repeat("2", written)
		want += old[min(len(want), len(old)):]
		require.Equal(t, want, text)
		seen[written/pageSize] = true
	}
	assert.Len(t, seen, 4, "none, one, two or all three pages")
}

// TestProcessesSeeTheDisk works on the disk through the kernel. `make powercut` runs it, since it needs FUSE.
func TestProcessesSeeTheDisk(t *testing.T) {
	t.Parallel()
	if os.Getenv("USHER_POWER_CUTS") == "" {
		t.Skip("skipped: needs FUSE and root; make powercut runs it")
	}
	d, dir := NewDisk(), t.TempDir()
	unmount, err := d.Mount(dir)
	require.NoError(t, err)
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string, flags int, after func(*os.File) error) {
		f, err := os.OpenFile(path(name), os.O_WRONLY|os.O_CREATE|flags, 0o600)
		require.NoError(t, err)
		_, err = f.WriteString(text)
		require.NoError(t, err)
		require.NoError(t, after(f))
		require.NoError(t, f.Close())
	}
	nothing := func(*os.File) error { return nil }
	sync := (*os.File).Sync
	require.NoError(t, os.MkdirAll(path("x/y"), 0o700))
	write("x/y/synced", "1", 0, sync)
	write("x/y/through", "2", os.O_SYNC, nothing)
	write("x/y/lost", "3", 0, nothing)
	write("x/y/synced", "+", os.O_APPEND, nothing)
	write("x/old", "old", 0, sync)
	write("x/old.tmp", "new", 0, sync)
	require.NoError(t, os.Rename(path("x/old.tmp"), path("x/old")))
	big := strings.Repeat("0123456789", 500_000)
	write("big", big, 0, sync)
	text, err := os.ReadFile(path("x/y/synced"))
	require.NoError(t, err)
	assert.Equal(t, "1+", string(text))
	require.NoError(t, unmount())

	d.Cut(Everything, nil)
	unmount, err = d.Mount(dir)
	require.NoError(t, err)
	defer func() { assert.NoError(t, unmount()) }()
	found := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(name string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			text, err := os.ReadFile(name)
			require.NoError(t, err)
			found[strings.TrimPrefix(name, dir+"/")] = string(text)
		}
		return err
	}))
	assert.Equal(t, map[string]string{
		"x/y/synced": "1", "x/y/through": "2", "x/old": "old", "x/old.tmp": "new", "big": big,
	}, found)
}
