package powercut

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Mount makes the disk visible to processes at an empty folder, until unmount, which works while files of it are still open.
func (d *Disk) Mount(dir string) (unmount func() error, err error) {
	const long = time.Hour // nothing changes but through the kernel
	timeout := long
	server, err := fs.Mount(dir, d.node(d.root), &fs.Options{
		EntryTimeout: &timeout, AttrTimeout: &timeout, NullPermissions: true, RootStableAttr: &fs.StableAttr{Ino: d.root.ino},
		MountOptions: fuse.MountOptions{
			AllowOther: true, FsName: "powercut", Name: "powercut", DirectMountStrict: true, DisableXAttrs: true, MaxWrite: 1 << 20,
			Options: []string{"default_permissions"},
		},
	})
	if err != nil {
		return nil, fmt.Errorf("mount the disk at %s: %w", dir, err)
	}
	return func() error {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		server.Wait()
		return nil
	}, nil
}

// node is an inode as the kernel sees it.
type node struct {
	fs.Inode
	disk *Disk
	self *inode
}

var _ interface {
	fs.NodeAllocater
	fs.NodeCreater
	fs.NodeFsyncer
	fs.NodeGetattrer
	fs.NodeLinker
	fs.NodeLookuper
	fs.NodeMkdirer
	fs.NodeMknoder
	fs.NodeOpener
	fs.NodeReaddirer
	fs.NodeReader
	fs.NodeReadlinker
	fs.NodeRenamer
	fs.NodeRmdirer
	fs.NodeSetattrer
	fs.NodeStatfser
	fs.NodeSymlinker
	fs.NodeUnlinker
	fs.NodeWriter
} = (*node)(nil)

// handle is an open file.
type handle struct{ sync bool }

func (d *Disk) node(n *inode) *node { return &node{disk: d, self: n} }

func (n *node) child(ctx context.Context, self *inode, out *fuse.EntryOut) *fs.Inode {
	self.attr(&out.Attr)
	return n.NewInode(ctx, n.disk.node(self), fs.StableAttr{Ino: self.ino, Mode: self.mode & syscall.S_IFMT})
}

func (n *inode) attr(out *fuse.Attr) {
	out.Ino, out.Mode, out.Nlink, out.Owner = n.ino, n.mode, uint32(len(n.links)), fuse.Owner{Uid: n.uid, Gid: n.gid}
	out.Size, out.Blksize = uint64(n.now.size), pageSize
	out.Blocks = uint64(len(n.now.pages)) * (pageSize / 512)
	switch n.mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		out.Nlink = 2
	case syscall.S_IFLNK:
		out.Size = uint64(len(n.target))
	}
	out.SetTimes(&n.atime, &n.mtime, &n.mtime)
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	n.self.attr(&out.Attr)
	return 0
}

func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	if mode, ok := in.GetMode(); ok {
		n.self.mode = n.self.mode&syscall.S_IFMT | mode&^uint32(syscall.S_IFMT)
	}
	if uid, ok := in.GetUID(); ok {
		n.self.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.self.gid = gid
	}
	if t, ok := in.GetATime(); ok {
		n.self.atime = t
	}
	if size, ok := in.GetSize(); ok {
		n.self.truncate(int64(size))
	}
	if t, ok := in.GetMTime(); ok {
		n.self.mtime = t
	}
	n.self.attr(&out.Attr)
	return 0
}

// Statfs: a large disk that is nearly empty.
func (*node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	const total = 64 << 30 / pageSize
	out.Bsize, out.Frsize, out.Blocks, out.Bfree, out.Bavail, out.Files, out.Ffree, out.NameLen = pageSize, pageSize, total, total, total, 1<<20, 1<<20, 255
	return 0
}

func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	self := n.self.entries[name]
	if self == nil {
		return nil, syscall.ENOENT
	}
	return n.child(ctx, self, out), 0
}

func (n *node) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	var list []fuse.DirEntry
	for _, name := range slices.Sorted(maps.Keys(n.self.entries)) {
		list = append(list, fuse.DirEntry{Name: name, Mode: n.self.entries[name].mode & syscall.S_IFMT, Ino: n.self.entries[name].ino})
	}
	return fs.NewListDirStream(list), 0
}

// create adds a new inode to the folder. The caller holds the lock.
func (n *node) create(ctx context.Context, name string, mode uint32) *inode {
	self := n.disk.inode(mode)
	if caller, ok := fuse.FromContext(ctx); ok {
		self.uid, self.gid = caller.Uid, caller.Gid
	}
	n.self.add(name, self)
	return self
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	return n.child(ctx, n.create(ctx, name, syscall.S_IFDIR|mode&0o7777), out), 0
}

func (n *node) Mknod(ctx context.Context, name string, mode, _ uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	return n.child(ctx, n.create(ctx, name, mode), out), 0
}

func (n *node) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	self := n.create(ctx, name, syscall.S_IFLNK|0o777)
	self.target = target
	return n.child(ctx, self, out), 0
}

func (n *node) Readlink(context.Context) ([]byte, syscall.Errno) { return []byte(n.self.target), 0 }

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	self := n.create(ctx, name, syscall.S_IFREG|mode&0o7777)
	return n.child(ctx, self, out), opened(flags), fuse.FOPEN_KEEP_CACHE, 0
}

func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	other, ok := target.(*node)
	if !ok {
		return nil, syscall.EXDEV
	}
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	n.self.add(name, other.self)
	return n.child(ctx, other.self, out), 0
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	n.self.remove(name)
	return 0
}

func (n *node) Rmdir(_ context.Context, name string) syscall.Errno {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	if dir := n.self.entries[name]; dir != nil && len(dir.entries) > 0 {
		return syscall.ENOTEMPTY
	}
	n.self.remove(name)
	return 0
}

func (n *node) Rename(_ context.Context, name string, newParent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	const noReplace = 1 // which the kernel has looked at
	to, ok := newParent.(*node)
	if !ok || flags&^noReplace != 0 {
		return syscall.EINVAL
	}
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	self := n.self.entries[name]
	if self == nil {
		return syscall.ENOENT
	}
	if old := to.self.entries[newName]; old != nil && len(old.entries) > 0 {
		return syscall.ENOTEMPTY
	}
	n.self.remove(name)
	to.self.add(newName, self)
	return 0
}

func opened(flags uint32) *handle { return &handle{sync: flags&syscall.O_DSYNC != 0} } // O_SYNC includes it

func (*node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return opened(flags), fuse.FOPEN_KEEP_CACHE, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	return fuse.ReadResultData(n.self.read(dest, off)), 0
}

func (n *node) Write(_ context.Context, f fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	n.self.write(data, off)
	if h, ok := f.(*handle); ok && h.sync {
		n.self.keep()
	}
	return uint32(len(data)), 0
}

func (n *node) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	const keepSize = 1
	if mode&^keepSize != 0 {
		return syscall.EOPNOTSUPP
	}
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	if end := int64(off + size); mode == 0 && end > n.self.now.size {
		n.self.truncate(end)
	}
	return 0
}

// Fsync serves fsync, fdatasync, msync and their like, of files and folders.
func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	n.disk.syncs++
	n.self.keep()
	return 0
}
