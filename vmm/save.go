package vmm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/fxamacker/cbor/v2"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"github.com/ftvmm/ftvmm/vmm/kvm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// A saved machine is one file:
//
//	magic    8 bytes  "FTVMMSAV"
//	version  4 bytes  little-endian
//	body     a zstd stream: the length (4 bytes, little-endian) of a [State] in deterministic CBOR, the State,
//	         then records of memory: address (8 bytes), pages (4 bytes), that many pages of 4 KiB; a record of 0 pages
//	         at address 0 ends it. Pages that are all zero are left out.
//	checksum 16 bytes XXH3-128 of all before, big-endian
const (
	saveMagic   = "FTVMMSAV"
	saveVersion = 1
	// maxState bounds the encoded State: device state is small, but disk requests
	// in flight carry their data.
	maxState = 256 << 20
	// runPages is the most pages in one record.
	runPages = 256
	// maxSaveWindow bounds the memory that a (possibly hostile) file makes the decompressor take.
	maxSaveWindow = 64 << 20
	checksumSize  = 16
)

// ErrNotSaved reports a file that is not a machine saved by this program, or was altered.
var ErrNotSaved = errors.New("vmm: not a saved machine")

// State is everything of a machine but the content of its memory.
type State struct {
	Machine  Fingerprint
	Position Position
	Halted   bool
	NMI      bool
	// Exit is set if the guest has ended: a state that a pair hands over, not one to be saved.
	Exit       *Exit
	CPU        CPUState
	Components []ComponentState
}

// Fingerprint is what the saved machine and the one it is restored into must share.
type Fingerprint struct {
	Memory  []memory.Extent
	Devices []string // the components' names, in order
	CPUID   []kvm.CPUIDEntry
}

// ComponentState is the state of one device in CBOR.
type ComponentState struct {
	Name string
	Data cbor.RawMessage
}

// CPUState is the state of one vCPU that KVM keeps.
type CPUState struct {
	Regs    kvm.Regs
	Sregs   kvm.Sregs
	XSave   []byte
	XCR0    uint64
	Debug   kvm.DebugRegs
	Events  kvm.Events
	MPState uint32
	MSRs    []kvm.MSREntry
	// IfFlag and Ready are what the last exit said about the guest's readiness for interrupts.
	IfFlag, Ready uint8
}

// component is a device that is saved and reset with the machine.
type component struct {
	name    string
	save    func() any
	restore func(b []byte) error
	reset   func()
}

// saver is what all devices have in common.
type saver[S any] interface {
	Save() S
	Restore(S) error
}

// add registers a device. The order is that of restoration and of resets.
func add[S any](m *Machine, name string, d saver[S], reset func()) {
	m.components = append(m.components, component{
		name:  name,
		save:  func() any { return d.Save() },
		reset: reset,
		restore: func(b []byte) error {
			var s S
			if err := decMode.Unmarshal(b, &s); err != nil {
				return err
			}
			return d.Restore(s)
		},
	})
}

// The canonical encoding: deterministic CBOR (RFC 8949, 4.2), so that equal states are equal bytes.
var (
	encMode = must(cbor.CoreDetEncOptions().EncMode())
	decMode = must(cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		MaxNestedLevels: 16, MaxArrayElements: 1 << 20, MaxMapPairs: 1 << 16,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (m *Machine) fingerprint() Fingerprint {
	f := Fingerprint{CPUID: m.cpuid}
	for _, r := range m.mem.Regions() {
		f.Memory = append(f.Memory, memory.Extent{Base: r.Base, Size: uint64(len(r.Bytes))})
	}
	for _, c := range m.components {
		f.Devices = append(f.Devices, c.name)
	}
	return f
}

// cpuState reads the vCPU. The last exit must be complete.
func (m *Machine) cpuState() (s CPUState, err error) {
	var errs [8]error
	s.Regs, errs[0] = m.vcpu.Regs()
	s.Sregs, errs[1] = m.vcpu.Sregs()
	s.XSave, errs[2] = m.vcpu.XSave()
	s.XCR0, errs[3] = m.vcpu.XCR0()
	s.Debug, errs[4] = m.vcpu.DebugRegs()
	s.Events, errs[5] = m.vcpu.Events()
	s.MPState, errs[6] = m.vcpu.MPState()
	s.MSRs, errs[7] = m.vcpu.MSRs(kernelMSRs)
	s.Sregs.CR8 = m.run.CR8
	s.IfFlag, s.Ready = m.run.IfFlag, m.run.ReadyForInterruptInjection
	return s, errors.Join(errs[:]...)
}

// setCPU writes the vCPU.
func (m *Machine) setCPU(s *CPUState) error {
	for _, f := range []func() error{
		func() error { return m.vcpu.SetSregs(&s.Sregs) },
		func() error { return m.vcpu.SetXCR0(s.XCR0) },
		func() error { return m.vcpu.SetXSave(s.XSave) },
		func() error { return m.vcpu.SetRegs(&s.Regs) },
		func() error { return m.vcpu.SetMSRs(s.MSRs) },
		func() error { return m.vcpu.SetDebugRegs(&s.Debug) },
		func() error { return m.vcpu.SetMPState(s.MPState) },
		func() error { return m.vcpu.SetEvents(&s.Events) },
	} {
		if err := f(); err != nil {
			return err
		}
	}
	m.run.CR8, m.run.Sync.Sregs = s.Sregs.CR8, s.Sregs
	m.run.IfFlag, m.run.ReadyForInterruptInjection = s.IfFlag, s.Ready
	return nil
}

// state returns the machine's state. The last exit must be complete.
func (m *Machine) state() (*State, error) {
	cpu, err := m.cpuState()
	if err != nil {
		return nil, err
	}
	s := &State{Machine: m.fingerprint(), Position: m.pos, Halted: m.halted, NMI: m.nmi, Exit: m.exit, CPU: cpu}
	for _, c := range m.components {
		b, err := encMode.Marshal(c.save())
		if err != nil {
			return nil, fmt.Errorf("vmm: encode state of %s: %w", c.name, err)
		}
		s.Components = append(s.Components, ComponentState{c.name, b})
	}
	return s, nil
}

// setState brings a new machine to a saved state, all but memory.
func (m *Machine) setState(s *State) error {
	if err := m.fingerprint().match(s.Machine); err != nil {
		return err
	}
	if len(s.Components) != len(m.components) {
		return fmt.Errorf("vmm: the state has %d components, this machine %d", len(s.Components), len(m.components))
	}
	for i, c := range m.components {
		if s.Components[i].Name != c.name {
			return fmt.Errorf("vmm: the state has %q where this machine has %q", s.Components[i].Name, c.name)
		}
		if err := c.restore(s.Components[i].Data); err != nil {
			return fmt.Errorf("vmm: restore %s: %w", c.name, err)
		}
	}
	m.pos, m.halted, m.nmi, m.incomplete, m.named = s.Position, s.Halted, s.NMI, false, true
	return m.setCPU(&s.CPU)
}

// Fingerprint returns what a machine must have to take this one's state.
func (m *Machine) Fingerprint() Fingerprint { return m.fingerprint() }

// State returns the state of a machine that does not run.
func (m *Machine) State() (*State, error) { return m.state() }

// Differs says how two states differ, nil if they do not: the registers of the vCPU, or the first device.
func (s *State) Differs(t *State) error {
	if a, b := fmt.Sprintf("%+v", s.CPU), fmt.Sprintf("%+v", t.CPU); a != b {
		i := 0
		for i < min(len(a), len(b)) && a[i] == b[i] {
			i++
		}
		from := max(0, i-80)
		return fmt.Errorf("vmm: the vCPUs differ: …%.160s, the other …%.160s", a[from:], b[from:])
	}
	for i := range s.Components {
		if i >= len(t.Components) || !bytes.Equal(s.Components[i].Data, t.Components[i].Data) {
			return fmt.Errorf("vmm: %s differs", s.Components[i].Name)
		}
	}
	if s.Position != t.Position || s.Halted != t.Halted || s.NMI != t.NMI {
		return fmt.Errorf("vmm: position %v, halted %v, NMI %v; the other %v, %v, %v", s.Position, s.Halted, s.NMI, t.Position, t.Halted, t.NMI)
	}
	return nil
}

// Match says how a machine with the fingerprint f differs from one with s.
func (f Fingerprint) Match(s Fingerprint) error { return f.match(s) }

// match says how the saved machine differs from this one.
func (f Fingerprint) match(s Fingerprint) error {
	if fmt.Sprint(f.Memory) != fmt.Sprint(s.Memory) {
		return fmt.Errorf("vmm: the saved machine's memory is %v, this one's %v: give it the same memory and firmware", s.Memory, f.Memory)
	}
	if fmt.Sprint(f.Devices) != fmt.Sprint(s.Devices) {
		return fmt.Errorf("vmm: the saved machine has the devices %v, this one %v", s.Devices, f.Devices)
	}
	if fmt.Sprint(f.CPUID) != fmt.Sprint(s.CPUID) {
		return errors.New("vmm: the machine was saved with another CPUID table: another processor model, kernel or version of ftvmm")
	}
	return nil
}

// Save writes the machine's state to a file, which is complete or not there: it is written
// beside its final name, synced and renamed. The guest is stopped meanwhile, and goes on
// afterwards unless it was paused.
func (m *Machine) Save(ctx context.Context, path string) error {
	return m.do(ctx, func() error {
		m.source.Pause()
		if !m.paused.Load() {
			defer m.source.Resume()
		}
		f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
		if err != nil {
			return fmt.Errorf("vmm: save: %w", err)
		}
		err = m.WriteState(f)
		if err == nil {
			err = f.Sync()
		}
		if e := f.Close(); err == nil {
			err = e
		}
		if err == nil {
			err = os.Rename(f.Name(), path)
		}
		if err != nil {
			os.Remove(f.Name())
			return fmt.Errorf("vmm: save: %w", err)
		}
		m.event("saved", map[string]any{"path": path})
		return nil
	})
}

// WriteState writes the saved form of a machine that does not run: one that has not
// started, has ended, or whose loop is the caller.
func (m *Machine) WriteState(w io.Writer) error {
	s, err := m.state()
	if err != nil {
		return err
	}
	b, err := encMode.Marshal(s)
	if err != nil {
		return fmt.Errorf("vmm: encode state: %w", err)
	}
	if len(b) > maxState {
		return fmt.Errorf("vmm: state of %d bytes is over the limit of %d", len(b), maxState)
	}
	sum := xxh3.New()
	buf := bufio.NewWriterSize(w, 1<<20)
	out := io.MultiWriter(buf, sum)
	head := binary.LittleEndian.AppendUint32([]byte(saveMagic), saveVersion)
	if _, err := out.Write(head); err != nil {
		return err
	}
	z, err := zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return err
	}
	if err := m.writeBody(z, b); err != nil {
		z.Close()
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	c := sum.Sum128().Bytes()
	if _, err := buf.Write(c[:]); err != nil {
		return err
	}
	return buf.Flush()
}

var zeroPage [memory.PageSize]byte

func (m *Machine) writeBody(w io.Writer, state []byte) error {
	if _, err := w.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(state)))); err != nil {
		return err
	}
	if _, err := w.Write(state); err != nil {
		return err
	}
	record := func(gpa uint64, pages []byte) error {
		h := binary.LittleEndian.AppendUint64(nil, gpa)
		h = binary.LittleEndian.AppendUint32(h, uint32(len(pages)/memory.PageSize))
		if _, err := w.Write(h); err != nil {
			return err
		}
		_, err := w.Write(pages)
		return err
	}
	for _, r := range m.mem.Regions() {
		for at := 0; at < len(r.Bytes); {
			n := 0
			for at+n < len(r.Bytes) && n < runPages*memory.PageSize && !bytes.Equal(r.Bytes[at+n:at+n+memory.PageSize], zeroPage[:]) {
				n += memory.PageSize
			}
			if n == 0 {
				at += memory.PageSize
				continue
			}
			if err := record(r.Base+uint64(at), r.Bytes[at:at+n]); err != nil {
				return err
			}
			at += n
		}
	}
	return record(0, nil)
}

// Restore brings a machine that has not run to the state in the file, which may be
// anybody's: a file that is not a saved machine, was altered or cut short, or is of another machine is
// refused. After an error the machine must be closed.
func (m *Machine) Restore(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("vmm: restore: %w", err)
	}
	defer f.Close()
	if err := m.ReadState(f); err != nil {
		return fmt.Errorf("vmm: restore %s: %w", path, err)
	}
	return nil
}

// ReadState reads what WriteState wrote into a machine that has not run.
func (m *Machine) ReadState(f io.ReadSeeker) error {
	if m.started.Load() {
		return errors.New("vmm: the machine has run already")
	}
	body, err := verify(f)
	if err != nil {
		return err
	}
	z, err := zstd.NewReader(body, zstd.WithDecoderMaxWindow(maxSaveWindow), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer z.Close()
	if err := m.readBody(bufio.NewReaderSize(z, 1<<20)); err != nil {
		return err
	}
	m.source.SetTime(m.clock.Now())
	m.reissue()
	return nil
}

// reissue sends to the backends again what a restored state is waiting for.
func (m *Machine) reissue() {
	for _, d := range m.disks {
		d.Reissue()
	}
	for _, n := range m.nics {
		n.Reissue()
	}
	if m.entropy != nil {
		m.entropy.Reissue()
	}
	if m.vcon != nil {
		m.vcon.Reissue()
	}
}

// verify checks magic, version and checksum, and returns the body's reader.
func verify(f io.ReadSeeker) (io.Reader, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	headSize := int64(len(saveMagic) + 4)
	if size < headSize+checksumSize {
		return nil, fmt.Errorf("%w: %d bytes are too few", ErrNotSaved, size)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	sum := xxh3.New()
	head := make([]byte, headSize)
	if _, err := io.ReadFull(io.TeeReader(f, sum), head); err != nil {
		return nil, err
	}
	if string(head[:len(saveMagic)]) != saveMagic {
		return nil, fmt.Errorf("%w: it does not begin with %q", ErrNotSaved, saveMagic)
	}
	if v := binary.LittleEndian.Uint32(head[len(saveMagic):]); v != saveVersion {
		return nil, fmt.Errorf("%w that this version can read: format %d, want %d", ErrNotSaved, v, saveVersion)
	}
	if _, err := io.CopyN(sum, f, size-headSize-checksumSize); err != nil {
		return nil, err
	}
	var want [checksumSize]byte
	if _, err := io.ReadFull(f, want[:]); err != nil {
		return nil, err
	}
	if sum.Sum128().Bytes() != want {
		return nil, fmt.Errorf("%w: the checksum is wrong, the file was altered or cut short", ErrNotSaved)
	}
	if _, err := f.Seek(headSize, io.SeekStart); err != nil {
		return nil, err
	}
	return io.LimitReader(f, size-headSize-checksumSize), nil
}

// readBody decodes the body. The checksum has been right, but that proves no good will:
// everything is checked all the same.
func (m *Machine) readBody(r io.Reader) error {
	var b [12]byte
	if _, err := io.ReadFull(r, b[:4]); err != nil {
		return fmt.Errorf("%w: %w", ErrNotSaved, err)
	}
	n := binary.LittleEndian.Uint32(b[:4])
	if n > maxState {
		return fmt.Errorf("%w: a state of %d bytes", ErrNotSaved, n)
	}
	var enc bytes.Buffer
	if got, err := io.CopyN(&enc, r, int64(n)); err != nil || got != int64(n) {
		return fmt.Errorf("%w: the state ends after %d of %d bytes", ErrNotSaved, got, n)
	}
	var s State
	if err := decMode.Unmarshal(enc.Bytes(), &s); err != nil {
		return fmt.Errorf("%w: %w", ErrNotSaved, err)
	}
	if err := m.fingerprint().match(s.Machine); err != nil {
		return err
	}
	if err := m.mem.Clear(); err != nil { // of what power-on has loaded
		return err
	}
	for {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return fmt.Errorf("%w: memory is cut short", ErrNotSaved)
		}
		gpa, pages := binary.LittleEndian.Uint64(b[:8]), uint64(binary.LittleEndian.Uint32(b[8:]))
		if pages == 0 {
			break
		}
		p, err := m.mem.Mutable(gpa, pages*memory.PageSize)
		if err != nil || pages > runPages || gpa%memory.PageSize != 0 {
			return fmt.Errorf("%w: %d pages of memory at %#x", ErrNotSaved, pages, gpa)
		}
		if _, err := io.ReadFull(r, p); err != nil {
			return fmt.Errorf("%w: memory is cut short", ErrNotSaved)
		}
	}
	return m.setState(&s)
}
