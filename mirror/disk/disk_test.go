package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// holdEnv makes the test binary hold an image open, as another process.
const holdEnv = "FTVMM_TEST_HOLD_IMAGE"

func TestMain(m *testing.M) {
	if path := os.Getenv(holdEnv); path != "" {
		d, err := Open(path, Options{})
		_, _ = fmt.Fprintln(os.Stdout, err)
		_, _ = io.Copy(io.Discard, os.Stdin) // until the parent is done
		if err == nil {
			d.Close()
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// do carries out one request.
func do(d backend.Disk, r blk.Request) error {
	done := make(chan error, 2)
	d.Submit(&r, func(err error) { done <- err })
	return <-done
}

func readAll(t require.TestingT, d backend.Disk) []byte {
	b := make([]byte, d.Info().Size)
	require.NoError(t, do(d, blk.Request{Op: blk.Read, Length: uint64(len(b)), Data: b}))
	return b
}

func newImage(t require.TestingT, dir string, size int) string {
	f, err := os.CreateTemp(dir, "image")
	require.NoError(t, err)
	require.NoError(t, f.Truncate(int64(size)))
	require.NoError(t, f.Close())
	return f.Name()
}

// directDir is a directory on a file system that has direct I/O.
func directDir(t *testing.T) string {
	dir := t.TempDir()
	d, err := Open(newImage(t, dir, 4096), Options{Direct: DirectOn})
	if err != nil {
		t.Skipf("the file system of %s has no direct I/O: %v", dir, err)
	}
	require.NoError(t, d.Close())
	return dir
}

// checkAgainstModel drives a disk and a byte slice with the same requests. Those in flight
// together do not overlap, as the interface asks; each Data has an alignment of its own.
func checkAgainstModel(t *rapid.T, d backend.Disk) {
	size := int(d.Info().Size)
	sectors := size / SectorSize
	model := readAll(t, d)
	t.Repeat(map[string]func(*rapid.T){
		"batch": func(t *rapid.T) {
			var wg sync.WaitGroup
			var mu sync.Mutex
			var errs []error
			type expected struct{ got, want []byte }
			var reads []expected
			at := 0
			for range rapid.IntRange(1, 8).Draw(t, "requests") {
				off := rapid.IntRange(at, sectors).Draw(t, "sector")
				n := rapid.IntRange(0, min(sectors-off, 40)).Draw(t, "sectors")
				at = off + n
				r := &blk.Request{Offset: uint64(off) * SectorSize, Length: uint64(n) * SectorSize}
				r.Op = rapid.SampledFrom([]blk.Op{blk.Read, blk.Write, blk.Write, blk.Discard, blk.WriteZeroes, blk.Flush}).Draw(t, "op")
				buf := make([]byte, n*SectorSize+SectorSize)
				shift := rapid.SampledFrom([]int{0, 1, 512 - int(uintptr(unsafe.Pointer(&buf[0]))%512)}).Draw(t, "shift")
				region := model[off*SectorSize : (off+n)*SectorSize]
				switch r.Op {
				case blk.Read:
					r.Data = buf[shift : shift+n*SectorSize]
					reads = append(reads, expected{r.Data, bytes.Clone(region)})
				case blk.Write:
					r.Data = buf[shift : shift+n*SectorSize]
					seed := rapid.Byte().Draw(t, "seed")
					for i := range r.Data {
						r.Data[i] = seed + byte(i) + byte(i>>8)
					}
					copy(region, r.Data)
				case blk.Flush:
					r.Offset, r.Length = 0, 0
				default:
					r.Unmap = rapid.Bool().Draw(t, "unmap")
					clear(region)
				}
				wg.Add(1)
				d.Submit(r, func(err error) {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
					wg.Done()
				})
			}
			wg.Wait()
			require.NoError(t, errors.Join(errs...))
			for _, r := range reads {
				require.True(t, bytes.Equal(r.want, r.got))
			}
		},
		"": func(t *rapid.T) {
			require.True(t, bytes.Equal(model, readAll(t, d)), "the disk differs from the model")
		},
	})
}

func TestADiskIsAByteSlice(t *testing.T) {
	for name, opts := range map[string]Options{
		"buffered":   {Direct: DirectOff},
		"direct":     {Direct: DirectOn},
		"one worker": {Workers: 1},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if opts.Direct == DirectOn {
				dir = directDir(t)
			}
			rapid.Check(t, func(t *rapid.T) {
				// The last one is not a multiple of a page.
				path := newImage(t, dir, rapid.SampledFrom([]int{512, 4096, 64 << 10, 40<<10 + 512}).Draw(t, "size"))
				defer os.Remove(path)
				d, err := Open(path, opts)
				require.NoError(t, err)
				checkAgainstModel(t, d)
				want := readAll(t, d)
				require.NoError(t, d.Close())
				got, err := os.ReadFile(path)
				require.NoError(t, err)
				require.True(t, bytes.Equal(want, got), "the image does not hold what the disk did")
			})
		})
	}
}

// strict is a file in memory that refuses what a device with large blocks refuses.
// With faults set it also does what no test can ask of a real file.
type strict struct {
	mu      sync.Mutex
	data    []byte
	align   int // of offsets, lengths and buffers; 1 for none
	noPunch bool
	short   bool // moves at most one aligned unit at a time
	eintr   int  // every so many calls
	calls   int
	synced  int
	fail    func(op string, off, n int64) error
	closed  int
}

func (s *strict) enter(op string, off, n int64, p []byte) error {
	s.calls++
	if s.eintr != 0 && s.calls%s.eintr == 0 {
		return unix.EINTR
	}
	if s.fail != nil {
		if err := s.fail(op, off, n); err != nil {
			return err
		}
	}
	if (off|n)%int64(s.align) != 0 || len(p) > 0 && uintptr(unsafe.Pointer(&p[0]))%uintptr(s.align) != 0 {
		return unix.EINVAL
	}
	return nil
}

func (s *strict) pread(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter("read", off, int64(len(p)), p); err != nil {
		return -1, err
	}
	if s.short {
		p = p[:min(len(p), max(s.align, 512))]
	}
	return copy(p, s.data[min(int(off), len(s.data)):]), nil
}

func (s *strict) pwrite(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter("write", off, int64(len(p)), p); err != nil {
		return -1, err
	}
	if s.short {
		p = p[:min(len(p), max(s.align, 512))]
	}
	return copy(s.data[off:], p), nil
}

func (s *strict) fallocate(mode uint32, off, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noPunch {
		return unix.EOPNOTSUPP
	}
	if err := s.enter("fallocate", off, n, nil); err != nil {
		return err
	}
	clear(s.data[off : off+n])
	return nil
}

func (s *strict) zeroOut(off, n uint64) error { return unix.ENOTTY }

func (s *strict) datasync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter("sync", 0, 0, nil); err != nil {
		return err
	}
	s.synced++
	return nil
}

func (s *strict) close() error { s.closed++; return nil }

// newStrictDisk returns a disk on a direct file with the given alignment and a cached one
// without, both on the same bytes.
func newStrictDisk(size, align int, opts Options) (*disk, *strict, *strict) {
	data := make([]byte, size)
	direct, cached := &strict{data: data, align: align}, &strict{data: data, align: 1}
	im := &image{path: "strict", size: uint64(size), cached: cached, align: uint64(align), memAlign: uint64(align)}
	im.useDirect(direct)
	if opts.Workers == 0 {
		opts.Workers = DefaultWorkers
	}
	return newDisk(im, opts), direct, cached
}

func TestUnalignedRequestsGoThroughBounceBuffers(t *testing.T) {
	for _, align := range []int{512, 4096, 16384} {
		t.Run(fmt.Sprint(align), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				size := rapid.SampledFrom([]int{align, 8 * align, 8*align + 512, 5*align + align - 512}).Draw(t, "size")
				d, direct, cached := newStrictDisk(size, align, Options{})
				for _, f := range []*strict{direct, cached} {
					f.short = rapid.Bool().Draw(t, "short")
					f.eintr = rapid.SampledFrom([]int{0, 2, 3}).Draw(t, "eintr")
					f.noPunch = rapid.Bool().Draw(t, "no punch")
				}
				checkAgainstModel(t, d)
				require.NoError(t, d.Close())
				require.Equal(t, []int{1, 1}, []int{direct.closed, cached.closed})
			})
		})
	}
}

func TestALargeUnalignedRequestIsCutIntoBounces(t *testing.T) {
	const size = 4*maxBounce + 4096
	d, _, _ := newStrictDisk(size, 4096, Options{})
	data := make([]byte, 3*maxBounce+512)
	for i := range data {
		data[i] = byte(i*7 + i>>12)
	}
	require.NoError(t, do(d, blk.Request{Op: blk.Write, Offset: 512, Length: uint64(len(data)), Data: data}))
	got := make([]byte, len(data))
	require.NoError(t, do(d, blk.Request{Op: blk.Read, Offset: 512, Length: uint64(len(got)), Data: got}))
	require.True(t, bytes.Equal(data, got))
	all := readAll(t, d)
	require.Equal(t, make([]byte, 512), all[:512])
	require.Equal(t, make([]byte, size-512-len(data)), all[512+len(data):])
	require.NoError(t, d.Close())
}

func TestNeighboursOfUnalignedWritesAreNotLost(t *testing.T) {
	// All sectors of a block at once: each write reads and writes the seven others.
	d, _, _ := newStrictDisk(4096, 4096, Options{})
	for round := range byte(50) {
		var wg sync.WaitGroup
		for s := range byte(8) {
			wg.Add(1)
			d.Submit(&blk.Request{Op: blk.Write, Offset: uint64(s) * 512, Length: 512, Data: bytes.Repeat([]byte{round ^ s}, 512)},
				func(error) { wg.Done() })
		}
		wg.Wait()
		for s, b := range readAll(t, d) {
			if b != round^byte(s/512) {
				require.Failf(t, "lost write", "round %d, byte %d: %d", round, s, b)
			}
		}
	}
	require.NoError(t, d.Close())
}

func TestErrorsOfTheStorageReachTheRequest(t *testing.T) {
	for name, tc := range map[string]struct {
		r    blk.Request
		op   string
		err  error
		want error
	}{
		"read error":             {blk.Request{Op: blk.Read, Length: 4096, Data: make([]byte, 4096)}, "read", unix.EIO, unix.EIO},
		"no space":               {blk.Request{Op: blk.Write, Length: 4096, Data: make([]byte, 4096)}, "write", unix.ENOSPC, unix.ENOSPC},
		"read before a write":    {blk.Request{Op: blk.Write, Length: 512, Data: make([]byte, 512)}, "read", unix.EIO, unix.EIO},
		"discard error":          {blk.Request{Op: blk.Discard, Length: 4096}, "fallocate", unix.EIO, unix.EIO},
		"no space to zero":       {blk.Request{Op: blk.WriteZeroes, Length: 4096}, "fallocate", unix.ENOSPC, unix.ENOSPC},
		"zeros that are written": {blk.Request{Op: blk.Discard, Length: 4096}, "write", unix.EIO, unix.EIO},
		"flush error":            {blk.Request{Op: blk.Flush}, "sync", unix.EIO, unix.EIO},
		"unknown operation":      {blk.Request{Op: 200}, "", nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			d, direct, cached := newStrictDisk(8192, 4096, Options{})
			fail := func(op string, _, _ int64) error {
				if op == tc.op {
					return tc.err
				}
				return nil
			}
			direct.fail, cached.fail = fail, fail
			cached.noPunch = tc.op == "write"
			err := do(d, tc.r)
			require.Error(t, err)
			if tc.want != nil {
				require.ErrorIs(t, err, tc.want)
			}
			err = d.Close()
			if tc.op == "sync" {
				require.ErrorIs(t, err, tc.want)
			} else {
				require.NoError(t, err)
			}
		})
	}
}

func TestAFailedFlushIsNotForgotten(t *testing.T) {
	d, _, cached := newStrictDisk(4096, 512, Options{})
	require.NoError(t, do(d, blk.Request{Op: blk.Flush}))
	cached.fail = func(op string, _, _ int64) error { return unix.EIO }
	require.ErrorIs(t, do(d, blk.Request{Op: blk.Flush}), unix.EIO)
	cached.fail = nil // as the kernel: it reports an error once
	require.ErrorIs(t, do(d, blk.Request{Op: blk.Flush}), unix.EIO)
	require.Equal(t, 1, cached.synced)
	require.ErrorIs(t, d.Close(), unix.EIO)
}

func TestAnImageThatShrinksIsAnError(t *testing.T) {
	path := newImage(t, t.TempDir(), 16384)
	for _, direct := range []Direct{DirectOff, DirectAuto} {
		require.NoError(t, os.Truncate(path, 16384))
		d, err := Open(path, Options{Direct: direct})
		require.NoError(t, err)
		require.NoError(t, os.Truncate(path, 8192))
		b := make([]byte, 16384)
		require.ErrorIs(t, do(d, blk.Request{Op: blk.Read, Length: 16384, Data: b}), io.ErrUnexpectedEOF)
		require.NoError(t, d.Close())
	}
}

func TestBadRequestsAreRefused(t *testing.T) {
	d, err := Open(newImage(t, t.TempDir(), 8192), Options{})
	require.NoError(t, err)
	for _, r := range []blk.Request{
		{Op: blk.Write, Offset: 8192, Length: 512, Data: make([]byte, 512)},
		{Op: blk.Write, Offset: 7680, Length: 1024, Data: make([]byte, 1024)},
		{Op: blk.Read, Offset: 1<<64 - 512, Length: 1024, Data: make([]byte, 1024)},
		{Op: blk.Read, Offset: 1, Length: 512, Data: make([]byte, 512)},
		{Op: blk.Read, Length: 512, Data: make([]byte, 511)},
		{Op: blk.Discard, Length: 16384},
	} {
		require.ErrorIs(t, do(d, r), ErrRange)
	}
	require.NoError(t, d.Close())
	require.NoError(t, d.Close(), "closing twice is harmless")
	require.ErrorIs(t, do(d, blk.Request{Op: blk.Flush}), ErrClosed)
}

func TestAReadOnlyDiskCannotBeChanged(t *testing.T) {
	path := newImage(t, t.TempDir(), 8192)
	require.NoError(t, os.Chmod(path, 0o444))
	d, err := Open(path, Options{ReadOnly: true, ID: "cd"})
	require.NoError(t, err)
	defer d.Close()
	require.Equal(t, true, d.Info().ReadOnly)
	require.Equal(t, false, d.Info().Discard)
	require.Equal(t, "cd", d.Info().ID)
	for _, op := range []blk.Op{blk.Write, blk.Discard, blk.WriteZeroes} {
		require.ErrorIs(t, do(d, blk.Request{Op: op, Length: 512, Data: make([]byte, 512)}), ErrReadOnly)
	}
	require.NoError(t, do(d, blk.Request{Op: blk.Flush}))
	readAll(t, d)
}

func TestTheQueueIsBounded(t *testing.T) {
	d, direct, _ := newStrictDisk(4096, 512, Options{Workers: 1})
	blocked, release := make(chan struct{}, 1), make(chan struct{})
	direct.fail = func(string, int64, int64) error {
		select {
		case blocked <- struct{}{}:
		default:
		}
		<-release
		return nil
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var full int
	submit := func() {
		wg.Add(1)
		d.Submit(&blk.Request{Op: blk.Read, Length: 512, Data: make([]byte, 512)}, func(err error) {
			if errors.Is(err, ErrQueueFull) {
				mu.Lock()
				full++
				mu.Unlock()
			}
			wg.Done()
		})
	}
	submit()
	<-blocked
	for range MaxQueued + 10 {
		submit()
	}
	close(release)
	wg.Wait()
	require.Equal(t, 10, full)
	require.NoError(t, d.Close())
}

func TestCloseCompletesWhatIsInFlight(t *testing.T) {
	d, _, cached := newStrictDisk(1<<20, 512, Options{Workers: 3})
	var mu sync.Mutex
	completed := 0
	for i := range 200 {
		d.Submit(&blk.Request{Op: blk.Write, Offset: uint64(i) * 512, Length: 512, Data: bytes.Repeat([]byte{1}, 512)}, func(err error) {
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				completed++
			}
		})
	}
	require.NoError(t, d.Close())
	require.Equal(t, 200, completed)
	require.Equal(t, 1, cached.synced, "Close makes the writes durable")
}

func TestObserveSeesEveryRequest(t *testing.T) {
	var mu sync.Mutex
	seen := map[blk.Op]int{}
	d, err := Open(newImage(t, t.TempDir(), 8192), Options{Observe: func(op blk.Op, waited, took time.Duration, err error) {
		mu.Lock()
		defer mu.Unlock()
		if waited < 0 || took < 0 {
			t.Error("negative time")
		}
		seen[op]++
	}})
	require.NoError(t, err)
	require.NoError(t, do(d, blk.Request{Op: blk.Flush}))
	require.NoError(t, do(d, blk.Request{Op: blk.Discard, Length: 512}))
	require.NoError(t, d.Close())
	require.Equal(t, map[blk.Op]int{blk.Flush: 1, blk.Discard: 1}, seen)
}

func TestDiscardGivesSpaceBack(t *testing.T) {
	path := newImage(t, directDir(t), 1<<20)
	d, err := Open(path, Options{})
	require.NoError(t, err)
	if !d.Info().Discard {
		require.NoError(t, d.Close())
		t.Skip("the file system cannot punch holes")
	}
	blocks := func() int64 {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(path, &st))
		return st.Blocks * 512
	}
	data := bytes.Repeat([]byte{0xaa}, 1<<20)
	require.NoError(t, do(d, blk.Request{Op: blk.Write, Length: 1 << 20, Data: data}))
	require.NoError(t, do(d, blk.Request{Op: blk.Flush}))
	require.GreaterOrEqual(t, blocks(), int64(1<<20))
	require.NoError(t, do(d, blk.Request{Op: blk.WriteZeroes, Length: 1 << 19}))
	require.GreaterOrEqual(t, blocks(), int64(1<<20), "without Unmap the space stays")
	require.NoError(t, do(d, blk.Request{Op: blk.Discard, Length: 1 << 19}))
	require.NoError(t, do(d, blk.Request{Op: blk.WriteZeroes, Offset: 1 << 19, Length: 1 << 19, Unmap: true}))
	require.Less(t, blocks(), int64(1<<19))
	require.Equal(t, make([]byte, 1<<20), readAll(t, d))
	require.NoError(t, d.Close())
}

func TestAnImageIsCreatedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	d, err := Open(path, Options{Create: 1 << 20})
	require.NoError(t, err)
	require.EqualValues(t, 1<<20, d.Info().Size)
	require.NoError(t, d.Close())
	st, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(defaultMode), st.Mode().Perm())
	d, err = Open(path, Options{Create: 2 << 20})
	require.NoError(t, err)
	require.EqualValues(t, 1<<20, d.Info().Size, "an image that exists keeps its size")
	require.NoError(t, d.Close())
}

func TestOpenErrorsNameReasonAndRemedy(t *testing.T) {
	dir := t.TempDir()
	odd := newImage(t, dir, 1000)
	empty := newImage(t, dir, 0)
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	good := newImage(t, dir, 4096)
	cases := []struct {
		reason, path string
		opts         Options
	}{
		{"image-missing", filepath.Join(dir, "none"), Options{}},
		{"image-missing", filepath.Join(good, "none"), Options{}},
		{"image-missing", filepath.Join(dir, "none"), Options{Create: 512, ReadOnly: true}},
		{"image-create", filepath.Join(dir, "no", "dir"), Options{Create: 512}},
		{"image-size", filepath.Join(dir, "none"), Options{Create: 511}},
		{"image-size", filepath.Join(dir, "none"), Options{Create: 1 << 63}},
		{"image-size", odd, Options{}},
		{"image-empty", empty, Options{}},
		{"image-is-directory", dir, Options{}},
		{"image-type", fifo, Options{}},
		{"image-type", "/dev/null", Options{}},
		{"disk-id", good, Options{ID: strings.Repeat("x", MaxID+1)}},
		{"disk-workers", good, Options{Workers: -1}},
		{"disk-workers", good, Options{Workers: MaxWorkers + 1}},
	}
	for _, tc := range cases {
		_, err := Open(tc.path, tc.opts)
		var e *mirror.Error
		require.ErrorAs(t, err, &e, "%s", tc.reason)
		require.Equal(t, tc.reason, e.Reason, "%v", err)
		require.NotEmpty(t, e.Remedy)
		require.ErrorContains(t, err, tc.path)
	}
	require.NoFileExists(t, filepath.Join(dir, "none"))
}

func TestDirectIOIsUsedWhereThereIsAny(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system without direct I/O takes root")
	}
	dir := t.TempDir()
	done := make(chan error, 1)
	go func() {
		// A mount of this thread's own, which ends with it.
		runtime.LockOSThread()
		err := errors.Join(
			unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_FS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("ramfs", dir, "ramfs", 0, ""))
		if err != nil {
			done <- err
			return
		}
		defer close(done)
		path := filepath.Join(dir, "image")
		d, err := Open(path, Options{Create: 8192})
		if err != nil {
			t.Error(err)
			return
		}
		data := bytes.Repeat([]byte{7}, 8192)
		if err := do(d, blk.Request{Op: blk.Write, Length: 8192, Data: data}); err != nil || !bytes.Equal(data, readAll(t, d)) {
			t.Error("the page cache does not do", err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err = Open(path, Options{Direct: DirectOn}); mirror.ReasonOf(err) != "direct-unsupported" {
			t.Errorf("got %v", err)
		}
	}()
	if err := <-done; err != nil {
		t.Skipf("no mount namespace: %v", err)
	}
}

func TestAnImageHasOneWriter(t *testing.T) {
	path := newImage(t, t.TempDir(), 4096)
	inUse := func(opts Options, by string) {
		t.Helper()
		_, err := Open(path, opts)
		require.Equal(t, "image-in-use", mirror.ReasonOf(err), "%v", err)
		require.ErrorContains(t, err, by)
	}
	d, err := Open(path, Options{})
	require.NoError(t, err)
	self := fmt.Sprintf("this process (pid %d)", os.Getpid())
	inUse(Options{}, self)
	inUse(Options{ReadOnly: true}, self)
	require.NoError(t, d.Close())

	r1, err := Open(path, Options{ReadOnly: true})
	require.NoError(t, err)
	r2, err := Open(path, Options{ReadOnly: true})
	require.NoError(t, err, "readers share")
	inUse(Options{}, self)
	require.NoError(t, r1.Close())
	inUse(Options{}, self)
	require.NoError(t, r2.Close())

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdEnv+"="+path)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	answer := make([]byte, 6)
	_, err = io.ReadFull(out, answer)
	require.NoError(t, err)
	require.Equal(t, "<nil>\n", string(answer))
	inUse(Options{}, fmt.Sprintf("(pid %d)", cmd.Process.Pid))
	require.NoError(t, in.Close())
	require.NoError(t, cmd.Wait())
	d, err = Open(path, Options{})
	require.NoError(t, err, "the lock ends with its process")
	require.NoError(t, d.Close())
}

func TestBlockDevices(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			dev := loopDevice(t, newImage(t, t.TempDir(), 128<<10), sector)
			for _, direct := range []Direct{DirectOn, DirectOff} {
				d, err := Open(dev, Options{Direct: direct})
				require.NoError(t, err)
				require.EqualValues(t, 128<<10, d.Info().Size)
				if direct == DirectOn {
					require.GreaterOrEqual(t, int(d.Info().BlockSize), sector)
				}
				_, err = Open(dev, Options{})
				require.Equal(t, "image-in-use", mirror.ReasonOf(err), "%v", err)
				rapid.Check(t, func(t *rapid.T) { checkAgainstModel(t, d) })
				require.NoError(t, d.Close())
			}
			d, err := Open(dev, Options{ReadOnly: true})
			require.NoError(t, err)
			readAll(t, d)
			require.NoError(t, d.Close())
		})
	}
}

// loopDevice makes a block device of a file, until the end of the test.
func loopDevice(t *testing.T, path string, sector int) string {
	if os.Geteuid() != 0 {
		t.Skip("setting up a loop device takes root")
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	defer ctl.Close()
	back, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer back.Close()
	// Between finding a free device and taking it another process may take it.
	for range 20 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		require.NoError(t, err)
		name := fmt.Sprintf("/dev/loop%d", n)
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("no loop device: %v", err)
		}
		err = unix.IoctlLoopConfigure(int(f.Fd()), &unix.LoopConfig{Fd: uint32(back.Fd()), Size: uint32(sector)})
		f.Close()
		if errors.Is(err, unix.EBUSY) {
			continue
		}
		require.NoError(t, err)
		t.Cleanup(func() {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			require.NoError(t, err)
			defer f.Close()
			require.NoError(t, unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0))
		})
		return name
	}
	t.Skip("no loop device was free for long enough")
	return ""
}

func TestDirectText(t *testing.T) {
	for _, text := range []string{"auto", "on", "off"} {
		var d Direct
		require.NoError(t, d.UnmarshalText([]byte(text)))
		b, err := d.MarshalText()
		require.NoError(t, err)
		require.Equal(t, text, string(b))
	}
	require.Equal(t, "disk-direct", mirror.ReasonOf(new(Direct).UnmarshalText([]byte("maybe"))))
}

// BenchmarkDisk measures 4 KiB requests at random offsets, by queue depth.
func BenchmarkDisk(b *testing.B) {
	const size = 256 << 20
	path := newImage(b, b.TempDir(), 0)
	require.NoError(b, os.WriteFile(path, make([]byte, size), 0o600))
	for _, direct := range []Direct{DirectAuto, DirectOff} {
		for _, op := range []blk.Op{blk.Read, blk.Write} {
			for _, depth := range []int{1, 32} {
				b.Run(fmt.Sprintf("direct=%v/op=%d/depth=%d", direct, op, depth), func(b *testing.B) {
					d, err := Open(path, Options{Direct: direct})
					require.NoError(b, err)
					defer d.Close()
					free := make(chan *blk.Request, depth)
					for range depth {
						free <- &blk.Request{Op: op, Length: 4096, Data: alignedTo(make([]byte, 8192), 4096)[:4096]}
					}
					var seed uint64 = 1
					b.SetBytes(4096)
					b.ResetTimer()
					for range b.N {
						r := <-free
						seed = seed*6364136223846793005 + 1442695040888963407
						r.Offset = seed >> 33 % (size / 4096) * 4096
						d.Submit(r, func(err error) {
							if err != nil {
								b.Error(err)
							}
							free <- r
						})
					}
					for range depth {
						<-free
					}
				})
			}
		}
	}
}
