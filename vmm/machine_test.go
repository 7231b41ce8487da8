package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

const testMemory = 16 << 20

func image(t testing.TB, name string) []byte {
	b, err := guests.Image(name)
	require.NoError(t, err)
	return b
}

// newTest makes a machine that runs a guest of ours.
func newTest(t testing.TB, guest, cmdline string) *Machine {
	m, err := New(Config{Memory: testMemory, Kernel: image(t, guest), Cmdline: cmdline, Serial: []Console{nil}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func TestNewRefusesWhatCannotRun(t *testing.T) {
	good := func() Config { return Config{Memory: testMemory, Kernel: image(t, "first")} }
	for name, change := range map[string]func(*Config){
		"no boot source":   func(c *Config) { c.Kernel = nil },
		"too little RAM":   func(c *Config) { c.Memory = 1 << 20 },
		"part of a page":   func(c *Config) { c.Memory += 1 },
		"two vCPUs":        func(c *Config) { c.CPUs = 2 },
		"three serials":    func(c *Config) { c.Serial = make([]Console, 3) },
		"source, no sink":  func(c *Config) { c.Source = &Live{} },
		"no kernel at all": func(c *Config) { c.Kernel = []byte("not a kernel") },
		"no KVM":           func(c *Config) { c.KVM = filepath.Join(t.TempDir(), "kvm") },
	} {
		t.Run(name, func(t *testing.T) {
			c := good()
			change(&c)
			_, err := New(c)
			require.Error(t, err)
			t.Log(err)
		})
	}
	_, err := New(Config{Memory: testMemory, Kernel: image(t, "first"), KVM: "/dev/null"})
	require.ErrorIs(t, err, kvm.ErrNoKVM)
}

// A guest that computes for ever without an exit is paused, looked at, resumed, reset and ended from outside.
func TestAGuestWithoutExitsObeys(t *testing.T) {
	m := newTest(t, "compute", "size=65536 rounds=1000000000")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := m.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, "created", s.State)
	var end Exit
	var wg sync.WaitGroup
	wg.Go(func() { end, err = m.Run(context.Background()) })

	require.Eventually(t, func() bool { s, e := m.Status(ctx); return e == nil && s.State == "running" }, time.Minute, time.Millisecond)
	require.NoError(t, m.Pause(ctx))
	require.NoError(t, m.Pause(ctx), "pausing twice is pausing once")
	a, err := m.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, "paused", a.State)
	b, err := m.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, a, b, "nothing moves while paused, time included")
	require.NoError(t, m.Resume(ctx))
	require.NoError(t, m.Reset(ctx))
	s, err = m.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, "running", s.State)
	require.EqualValues(t, 1, s.Stats.Resets)
	m.Quit()
	wg.Wait()
	require.NoError(t, err)
	require.Equal(t, ExitQuit, end.Reason)
	require.ErrorIs(t, m.Pause(ctx), ErrEnded)
	_, err = m.Run(ctx)
	require.Error(t, err, "a machine runs once")
}

func TestSeveralMachinesInOneProcess(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		m := newTest(t, "hello", "")
		wg.Go(func() {
			e, err := m.Run(context.Background())
			if err != nil || e.Reason != ExitDebugExit || e.Code != 0 {
				t.Errorf("%+v, %v", e, err)
			}
		})
	}
	wg.Wait()
}

// The bell reaches a sleeping loop however the ring and the sleep race.
func TestBellIsNeverMissed(t *testing.T) {
	var b Bell
	const rounds = 20_000
	var heard atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for heard.Load() < rounds {
			b.Sleep(-1)
			if b.answer() {
				heard.Add(1)
			}
		}
	}()
	for i := int64(0); i < rounds; i++ {
		b.Ring()
		for heard.Load() == i {
			runtime.Gosched()
		}
	}
	<-done
}

// saved returns the bytes of a saved machine that has not run.
func saved(t testing.TB) []byte {
	var b bytes.Buffer
	require.NoError(t, newTest(t, "hello", "").WriteState(&b))
	return b.Bytes()
}

func TestRestoreRefusesForeignCutAndAlteredFiles(t *testing.T) {
	good := saved(t)
	require.NoError(t, newTest(t, "hello", "").ReadState(bytes.NewReader(good)))
	change := func(at int, v byte) []byte {
		b := bytes.Clone(good)
		b[at] ^= v
		return b
	}
	for name, b := range map[string][]byte{
		"empty":          nil,
		"foreign":        bytes.Repeat([]byte("FTVMM"), 100),
		"another format": change(8, 1),
		"cut":            good[:len(good)-1],
		"cut short":      good[:20],
		"longer":         append(bytes.Clone(good), 0),
		"bit in body":    change(len(good)/2, 4),
		"bit in sum":     change(len(good)-1, 128),
	} {
		t.Run(name, func(t *testing.T) {
			err := newTest(t, "hello", "").ReadState(bytes.NewReader(b))
			require.ErrorIs(t, err, ErrNotSaved)
			t.Log(err)
		})
	}
	other, err := New(Config{Memory: testMemory * 2, Kernel: image(t, "hello"), Serial: []Console{nil}})
	require.NoError(t, err)
	require.ErrorContains(t, other.ReadState(bytes.NewReader(good)), "same memory")
	require.NoError(t, other.Close())
	other, err = New(Config{Memory: testMemory, Kernel: image(t, "hello")})
	require.NoError(t, err)
	require.ErrorContains(t, other.ReadState(bytes.NewReader(good)), "devices")
	require.NoError(t, other.Close())
}

func TestSaveIsWholeOrNotThere(t *testing.T) {
	m := newTest(t, "compute", "size=65536 rounds=1000000000")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = m.Run(context.Background())
	}()
	ctx := context.Background()
	dir := t.TempDir()
	require.NoError(t, m.Save(ctx, filepath.Join(dir, "state")))
	require.Error(t, m.Save(ctx, filepath.Join(dir, "missing", "state")))
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1, "no temporary file is left")
	m.Quit()
	<-done
}

// seal makes a file with a right checksum of any body.
func seal(t testing.TB, body []byte) []byte {
	b := binary.LittleEndian.AppendUint32([]byte(saveMagic), saveVersion)
	z, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	b = z.EncodeAll(body, b)
	sum := xxh3.Hash128(b).Bytes()
	return append(b, sum[:]...)
}

// Bodies with a right checksum and any content: an error or a machine that can be closed, no panic.
func FuzzReadState(f *testing.F) {
	good := saved(f)
	z, err := zstd.NewReader(nil)
	require.NoError(f, err)
	body, err := z.DecodeAll(good[len(saveMagic)+4:len(good)-checksumSize], nil)
	require.NoError(f, err)
	const seed = 16 << 10 // the State and some memory: whole files make a slow fuzzer
	f.Add(body[:min(seed, len(body))])
	f.Add([]byte{4, 0, 0, 0, 0xa0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, body []byte) {
		m := newTest(t, "hello", "")
		_ = m.ReadState(bytes.NewReader(seal(t, body)))
	})
}
