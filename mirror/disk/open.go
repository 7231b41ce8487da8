package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/mirror"
)

// defaultMode is that of an image that Open makes: a guest's disk is nobody else's to read.
const defaultMode = 0o600

// fdFile is an open descriptor.
type fdFile int

func (f fdFile) pread(p []byte, off int64) (int, error)  { return unix.Pread(int(f), p, off) }
func (f fdFile) pwrite(p []byte, off int64) (int, error) { return unix.Pwrite(int(f), p, off) }
func (f fdFile) datasync() error                         { return unix.Fdatasync(int(f)) }
func (f fdFile) close() error                            { return unix.Close(int(f)) }

func (f fdFile) fallocate(mode uint32, off, n int64) error {
	return unix.Fallocate(int(f), mode, off, n)
}

func (f fdFile) zeroOut(off, n uint64) error {
	// BLKZEROOUT takes two 64-bit numbers, first byte and count (linux/fs.h).
	span := [2]uint64{off, n}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}

// openImage opens, checks and locks the image at path.
func openImage(path string, opts Options) (_ *image, err error) {
	fd, err := openOrCreate(path, opts)
	if err != nil {
		return nil, err
	}
	im := &image{path: path, cached: fdFile(fd)}
	defer func() {
		if err != nil {
			im.close()
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, openError(path, opts, err)
	}
	device := st.Mode&unix.S_IFMT == unix.S_IFBLK
	if err := lock(fd, path, opts.ReadOnly); err != nil {
		return nil, err
	}
	// The size counts from here on: before, another process might have been changing it.
	size, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		return nil, openError(path, opts, err)
	}
	switch {
	case size == 0:
		return nil, mirror.Errorf("image-empty", fmt.Sprintf("Give it a size, for example with: truncate -s 10G %s", path),
			"open disk %s: the image is empty", path)
	case size%SectorSize != 0:
		// Rounding down would hide the end of a file that was cut off or is no raw image.
		return nil, mirror.Errorf("image-size", fmt.Sprintf("Check that it is a complete raw image; to pad it: truncate -s %%%d %s", SectorSize, path),
			"open disk %s: its size of %d bytes is not a multiple of %d", path, size, SectorSize)
	}
	im.size = uint64(size)
	im.blockSize = pageSize
	if device {
		im.discards = deviceDiscards(st.Rdev)
		if n, err := unix.IoctlGetInt(fd, unix.BLKPBSZGET); err == nil && validAlign(uint64(n)) {
			im.blockSize = uint32(max(n, SectorSize))
		}
	} else {
		im.noZeroOut.Store(true)
		// Beyond the end a hole changes nothing, so that this only asks.
		im.discards = unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE,
			int64(roundUp(im.size, pageSize)), pageSize) == nil
		im.noPunch.Store(!im.discards)
	}
	if opts.Direct != DirectOff {
		if err := im.openDirect(fd, opts); err != nil && opts.Direct == DirectOn {
			return nil, mirror.Errorf("direct-unsupported", "Use direct=auto, or move the image to a file system with direct I/O (ext4, XFS, a block device).",
				"open disk %s for direct I/O: %w", path, err)
		}
	}
	return im, nil
}

// openOrCreate opens path, without any of the waiting that opening a FIFO or a tape may do.
func openOrCreate(path string, opts Options) (fd int, err error) {
	flags := unix.O_RDWR | unix.O_CLOEXEC | unix.O_NONBLOCK
	if opts.ReadOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err == nil {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
		case unix.S_IFBLK:
			if !opts.ReadOnly {
				flags |= unix.O_EXCL // fails if it is mounted or part of another device
			}
		case unix.S_IFDIR:
			return -1, mirror.Errorf("image-is-directory", "Name a raw image file or a block device.", "open disk %s: it is a directory", path)
		default:
			return -1, mirror.Errorf("image-type", "Name a raw image file or a block device.", "open disk %s: neither a file nor a block device", path)
		}
	} else if errors.Is(err, unix.ENOENT) && opts.Create != 0 {
		return create(path, opts)
	}
	fd, err = openFD(path, flags)
	if err != nil {
		return -1, openError(path, opts, err)
	}
	return fd, nil
}

func create(path string, opts Options) (fd int, err error) {
	switch {
	case opts.ReadOnly:
		return -1, mirror.Errorf("image-missing", "Check the path: a read-only disk is not created.", "open disk %s: %w", path, fs.ErrNotExist)
	case opts.Create%SectorSize != 0 || opts.Create > MaxSize:
		return -1, mirror.Errorf("image-size", fmt.Sprintf("Choose a multiple of %d.", SectorSize), "create disk %s: %d is not a disk's size in bytes", path, opts.Create)
	}
	// O_EXCL: the loser of a race opens nothing rather than what the winner has not finished.
	fd, err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, defaultMode)
	if err == nil {
		if err = retry(func() error { return unix.Ftruncate(fd, int64(opts.Create)) }); err == nil {
			return fd, nil
		}
		unix.Close(fd)
		_ = unix.Unlink(path)
	}
	return -1, mirror.Errorf("image-create", "Check that the directory exists, is writable, and its file system can hold the size.", "create disk %s: %w", path, err)
}

func openFD(path string, flags int) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Open(path, flags, 0)
		return err
	})
	return fd, err
}

// openError gives an error of opening its reason and remedy.
func openError(path string, opts Options, err error) error {
	reason, remedy := "image-error", "Check the storage that holds the image."
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		reason, remedy = "image-missing", "Check the path, or give a size to create the image with."
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		reason, remedy = "image-not-permitted", "Give this user read and write access to the image, or open it read-only."
		if opts.ReadOnly {
			remedy = "Give this user read access to the image."
		}
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.ETXTBSY):
		reason, remedy = "image-not-writable", "Open it read-only, or move it to a writable file system."
	case errors.Is(err, unix.EBUSY):
		reason, remedy = "image-in-use", "Unmount the device, or stop what else uses it (lsblk shows it)."
	}
	return &mirror.Error{Reason: reason, Remedy: remedy, Err: fmt.Errorf("open disk %s: %w", path, err)}
}

// openDirect opens the file below fd once more for direct I/O, if that works.
func (im *image) openDirect(fd int, opts Options) error {
	flags := unix.O_RDWR | unix.O_CLOEXEC | unix.O_DIRECT
	if opts.ReadOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_DIRECT
	}
	// By descriptor, not by path: the path may name another file by now.
	direct, err := openFD("/proc/self/fd/"+strconv.Itoa(fd), flags)
	if err != nil {
		return err
	}
	im.align, im.memAlign, err = alignment(direct)
	if err != nil {
		unix.Close(direct)
		return err
	}
	im.useDirect(fdFile(direct))
	im.blockSize = max(im.blockSize, uint32(im.align))
	return nil
}

// useDirect sets the direct file, whose alignments are set.
func (im *image) useDirect(f file) {
	im.direct = f
	im.directEnd = im.size
	if im.size%im.align != 0 {
		im.directEnd = im.size &^ (max(im.align, pageSize) - 1)
	}
}

// alignment returns the alignments in bytes that direct I/O on fd needs.
func alignment(fd int) (offset, memory uint64, err error) {
	var stx unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx); err == nil && stx.Mask&unix.STATX_DIOALIGN != 0 {
		offset, memory = uint64(stx.Dio_offset_align), uint64(stx.Dio_mem_align)
		if offset == 0 || memory == 0 {
			return 0, 0, unix.EOPNOTSUPP
		}
		// A request is never smaller than a sector.
		offset = max(offset, SectorSize)
		if !validAlign(offset) || !validAlign(memory) {
			return 0, 0, fmt.Errorf("alignment of %d (buffers %d) bytes", offset, memory)
		}
		return offset, memory, nil
	}
	// Before Linux 6.1, and on file systems that do not say: try.
	b := getBounce()
	defer putBounce(b)
	for a := uint64(SectorSize); a <= maxAlign; a *= 2 {
		err = retry(func() error {
			_, err := unix.Pread(fd, b[:a], 0)
			return err
		})
		if !errors.Is(err, unix.EINVAL) {
			return a, a, err
		}
	}
	return 0, 0, err
}

func validAlign(a uint64) bool { return a > 0 && a <= maxAlign && a&(a-1) == 0 }

// deviceDiscards reports whether a block device gives back the space of a zeroed range.
func deviceDiscards(dev uint64) bool {
	node := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
	for _, queue := range [...]string{"queue", "../queue"} { // a partition's is its parent's
		if b, err := os.ReadFile(filepath.Join(node, queue, "discard_max_bytes")); err == nil {
			n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
			return err == nil && n > 0
		}
	}
	return false
}

// lock takes the image for this open file description: alone for a writer, together with
// other readers otherwise. It covers every byte, and so also those on which QEMU keeps its
// own locks: each notices the other.
func lock(fd int, path string, readOnly bool) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	if readOnly {
		l.Type = unix.F_RDLCK
	}
	err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		by := "another process"
		if h := holder(fd); h != "" {
			by = h
		}
		return mirror.Errorf("image-in-use", "Stop the program that uses the image, or open it read-only on both sides.",
			"open disk %s: in use by %s", path, by)
	}
	return mirror.Errorf("image-lock", "Move the image to a file system with locks (on NFS: version 4, or nolock off).",
		"lock disk %s: %w", path, err)
}

const (
	maxHolderProcs = 4096 // processes that holder looks at
	maxHolderFDs   = 4096 // descriptors of each
)

// holder names a process that holds a lock on the file below fd, as far as this user may
// know; "" if it finds none. /proc/locks has no owner for locks of this kind (they
// belong to open files), but a descriptor's fdinfo lists them.
func holder(fd int) string {
	var want unix.Stat_t
	if unix.Fstat(fd, &want) != nil {
		return ""
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return ""
	}
	procs = procs[:min(len(procs), maxHolderProcs)]
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		dir, err := os.Open("/proc/" + p.Name() + "/fd")
		if err != nil {
			continue
		}
		names, _ := dir.Readdirnames(maxHolderFDs)
		dir.Close()
		for _, name := range names {
			var st unix.Stat_t
			if unix.Stat("/proc/"+p.Name()+"/fd/"+name, &st) != nil || st.Dev != want.Dev || st.Ino != want.Ino {
				continue
			}
			info, err := os.ReadFile("/proc/" + p.Name() + "/fdinfo/" + name)
			if err != nil || !strings.Contains(string(info), "\nlock:") {
				continue
			}
			if pid == os.Getpid() {
				return fmt.Sprintf("this process (pid %d)", pid)
			}
			comm, _ := os.ReadFile("/proc/" + p.Name() + "/comm")
			return fmt.Sprintf("%s (pid %d)", strings.TrimSpace(string(comm)), pid)
		}
	}
	return ""
}
