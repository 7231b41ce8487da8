package vmm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// ExitReason says why a machine ended.
type ExitReason string

// The reasons.
const (
	ExitPowerOff  ExitReason = "power-off"  // the guest switched itself off
	ExitDebugExit ExitReason = "debug-exit" // the guest wrote Exit.Code to the debug exit port
	ExitReset     ExitReason = "reset"      // the guest asked for a reset, and Config.ExitOnReset is set
	ExitCrash     ExitReason = "crash"      // triple fault, or an instruction that KVM cannot emulate
	ExitQuit      ExitReason = "quit"       // the user ended it
)

// Exit is how a machine ended.
type Exit struct {
	Reason ExitReason
	Code   uint32 // what the guest wrote to the debug exit port
	Detail string // for a crash: what happened, and where
}

// Limits of the loop.
const (
	// maxCompletions bounds the exits in a row that completing one instruction may cause: a
	// REP string instruction on a device makes many, and each is a stop of its own.
	maxCompletions = 1 << 20
)

// Run runs the guest until it ends by itself, [Machine.Quit] is called, or ctx is cancelled. It
// may be called once. The error is about the host (KVM failed); a guest's crash is an Exit.
func (m *Machine) Run(ctx context.Context) (Exit, error) {
	if !m.started.CompareAndSwap(false, true) {
		return Exit{}, errors.New("vmm: the machine has run already")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(m.done)
	m.bell.tid.Store(int32(unix.Gettid()))
	// Timers of a halted guest are futex waits: without slack they end on time. Zero
	// restores the thread's default.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }()
	stop := context.AfterFunc(ctx, func() { m.Quit() })
	defer stop()

	m.source.Resume()
	m.event("started", nil)
	err := m.loop()
	if s, ok := m.source.(Ender); ok {
		for err == nil {
			if m.exit == nil {
				err = m.loop()
			} else if s.Ended(*m.exit) {
				break
			} else {
				err = m.queued()
			}
		}
	}
	m.source.Pause()
	if err != nil {
		return Exit{}, err
	}
	m.event("exited", map[string]any{"reason": string(m.exit.Reason), "code": m.exit.Code, "detail": m.exit.Detail})
	return *m.exit, nil
}

// loop is the vCPU loop. It returns nil when m.exit is set.
func (m *Machine) loop() error {
	for m.exit == nil {
		if m.bell.answer() || m.commandsRung {
			m.commandsRung = false
			if err := m.attend(); err != nil || m.exit != nil {
				return err
			}
		}
		if m.fresh {
			m.fresh = false
			m.takeInputs()
			continue
		}
		if m.resetWanted {
			if err := m.reset(); err != nil || m.exit != nil {
				return err
			}
		}
		if m.halted {
			if err := m.waitHalted(); err != nil || m.exit != nil {
				return err
			}
			if m.resetWanted || m.fresh {
				continue
			}
		}
		if m.stopWanted {
			if err := m.completeAll(); err != nil || m.exit != nil {
				return err
			}
			m.end(Exit{Reason: ExitQuit})
			return nil
		}
		again, err := m.deliver()
		if err != nil {
			return err
		}
		if again {
			continue
		}
		if m.lingers != nil {
			m.lingers.Linger()
		}
		m.source.Arm(m.clock.Next())
		if m.fresh || m.exit != nil {
			continue
		}
		if m.async != nil {
			if to, ok := m.async.Next(m.pos); ok {
				if err := m.land(to); err != nil {
					if s, ok := m.source.(Misser); !ok || !errors.Is(err, ErrLanding) || !s.Missed(err) {
						return err
					}
				}
				continue
			}
			if m.fresh || m.exit != nil {
				continue
			}
		}
		m.slice.enter()
		if !m.bell.enter() {
			continue
		}
		m.named = false
		errno := m.vcpu.Run()
		m.bell.left()
		if err := m.left(errno); err != nil {
			return err
		}
	}
	return nil
}

// attend answers the bell: commands first, then, if the guest may get inputs at a stop that
// has no name, inputs.
func (m *Machine) attend() error {
	if err := m.commands(); err != nil || m.exit != nil {
		return err
	}
	if m.source.Anywhere() {
		m.takeInputs()
		return nil
	}
	m.inputsRung = true // at the next synchronous exit
	if m.named {
		return nil
	}
	if m.async != nil && m.async.Due(m.pos) {
		if ok, err := m.name(); ok || err != nil {
			if ok {
				m.takeInputs()
			}
			return err
		}
	}
	m.cannot()
	return nil
}

// cannot tells the source that what waits for the guest cannot reach it here.
func (m *Machine) cannot() {
	if m.stuck != nil && !m.named {
		m.stuck.Stuck(m.pos)
	}
}

// takeInputs takes and applies the inputs for the present stop.
func (m *Machine) takeInputs() {
	m.inputsRung = false
	m.inputs = m.source.Take(m.pos, m.clock.Next(), m.inputs[:0])
	for i := range m.inputs {
		m.apply(&m.inputs[i])
	}
	if len(m.inputs) > 0 {
		m.stats.Inputs += uint64(len(m.inputs))
		m.source.Applied(m.inputs)
		clear(m.inputs)
	}
}

// left handles the return of KVM_RUN.
func (m *Machine) left(errno unix.Errno) error {
	m.syncTPR()
	m.opening.hit = false
	switch errno {
	case 0:
	case unix.EINTR:
		m.dangling = false
		// A signal or our own immediate exit: the exit before is complete, nothing else has
		// happened, and nothing is counted.
		m.run.SetImmediateExit(false)
		m.incomplete = false
		m.stats.Interrupted++
		return nil
	case unix.EAGAIN:
		return nil
	default:
		return fmt.Errorf("vmm: run vCPU: %w", errno)
	}
	switch m.run.ExitReason {
	case kvm.ExitIRQWindowOpen, kvm.ExitIntr, kvm.ExitDebug:
		m.incomplete, m.dangling = false, false
		m.stats.Windows++
		if err := m.opened(); err != nil {
			return err
		}
		if m.async != nil && !m.source.Anywhere() {
			return m.window()
		}
		return nil
	}
	m.pos = Position{Exit: m.pos.Exit + 1}
	m.named, m.noWindow, m.dangling = true, false, true
	m.stats.Exits++
	if m.counter != nil {
		if err := m.counter.Restart(); err != nil {
			return err
		}
	}
	if m.inputsRung || m.bell.Rung() || m.source.EveryStop() {
		if m.bell.answer() {
			// Commands wait until the exit is complete.
			m.commandsRung = true
		}
		m.takeInputs()
		if m.fresh {
			return nil
		}
	}
	return m.handle()
}

// deliver injects an interrupt if one is due and the guest can take it. It returns true if
// the loop must start over: completing the exit caused another.
func (m *Machine) deliver() (again bool, err error) {
	_, _, pending := m.apic.Pending()
	if !pending && !m.nmi {
		return false, m.forgetWindow()
	}
	if m.incomplete && !m.nmi && m.run.IfFlag == 0 {
		// Interrupts are off, and completing an access to a device does not turn them on:
		// the vector waits, and the instruction is completed by the next entry.
		m.cannot()
		return false, m.awaitWindow()
	}
	if m.incomplete {
		// Injecting on an incomplete exit could lose the vector, or deliver it inside the
		// handler of a fault that the instruction still has to take.
		if done, err := m.complete(); err != nil || !done {
			return true, err
		}
	}
	if !m.named && !m.source.Anywhere() {
		// This stop has no name, so that another run would not have it: what is due waits.
		m.cannot()
		return false, m.awaitWindow()
	}
	if m.nmi {
		m.nmi = false
		if err := m.vcpu.NMI(); err != nil {
			return false, err
		}
	}
	if !pending {
		return false, nil
	}
	if m.run.ReadyForInterruptInjection != 0 && m.run.IfFlag != 0 {
		vector, extint, _ := m.apic.Pending()
		if extint {
			vector = int(m.pic.Acknowledge())
		} else {
			vector = m.apic.Acknowledge(vector)
		}
		if err := m.inject(uint8(vector)); err != nil {
			return false, err
		}
		m.stats.Interrupts++
		m.run.ReadyForInterruptInjection = 0 // until the next exit tells again
		if _, _, ok := m.apic.Pending(); !ok {
			return false, m.forgetWindow()
		}
	}
	return false, m.awaitWindow()
}

// window names the stop at which the guest can take an interrupt that waits. If it
// cannot be named the interrupt waits for the next synchronous exit.
func (m *Machine) window() error {
	if !m.async.Due(m.pos) {
		m.noWindow = true
		return nil
	}
	ok, err := m.name()
	if ok {
		m.takeInputs()
	} else {
		m.noWindow = true
	}
	return err
}

// complete finishes the instruction that caused the last exit, without entering the
// guest further. done is false if it caused another exit, which has been handled.
func (m *Machine) complete() (done bool, err error) {
	m.run.SetImmediateExit(true)
	errno := m.vcpu.Run()
	if err := m.left(errno); err != nil {
		return false, err
	}
	m.run.SetImmediateExit(false)
	if !m.incomplete {
		m.named = true // the guest has not gone further than its exit
	}
	return !m.incomplete, nil
}

// completeAll completes the last exit, handling those that this causes.
func (m *Machine) completeAll() error {
	for i := 0; m.incomplete && m.exit == nil; i++ {
		if i == maxCompletions {
			return fmt.Errorf("vmm: an instruction at exit %v does not complete", m.pos)
		}
		if _, err := m.complete(); err != nil {
			return err
		}
	}
	return nil
}

// syncTPR brings a CR8 that the guest has changed to the local APIC.
func (m *Machine) syncTPR() {
	if cr8 := uint8(m.run.CR8); cr8 != m.apic.CR8() {
		m.apic.SetCR8(cr8)
	}
}

// pushTPR brings a task priority that the guest has changed through the local APIC to CR8.
func (m *Machine) pushTPR() { m.run.CR8 = uint64(m.apic.CR8()) }

// advance moves virtual time to the present, for a guest's access that depends on it.
func (m *Machine) advance() { m.clock.Advance(m.source.Sample(m.pos)) }

// handle carries out the exit that KVM_RUN returned.
func (m *Machine) handle() error {
	m.incomplete = true
	switch m.run.ExitReason {
	case kvm.ExitIO:
		return m.handleIO()
	case kvm.ExitMMIO:
		m.handleMMIO()
	case kvm.ExitHLT:
		m.incomplete = false
		m.observe(ExitRecord{Kind: KindHLT})
		m.halted = true // the loop waits
	case kvm.ExitRDMSR:
		e := m.run.MSR()
		if m.msrNeedsTime(e.Index, false) {
			m.advance()
		}
		v, ok := m.readMSR(e.Index)
		if !ok {
			m.unknownMSR(e.Index, false, 0)
		}
		e.Data, e.Error = v, boolByte(!ok)
		m.observe(ExitRecord{Kind: KindRDMSR, Addr: uint64(e.Index), Size: 8, Data: v})
	case kvm.ExitWRMSR:
		e := m.run.MSR()
		if m.msrNeedsTime(e.Index, true) {
			m.advance()
		}
		m.observe(ExitRecord{Kind: KindWRMSR, Addr: uint64(e.Index), Size: 8, Data: e.Data})
		ok := m.writeMSR(e.Index, e.Data)
		if !ok {
			m.unknownMSR(e.Index, true, e.Data)
		}
		e.Error = boolByte(!ok)
		m.pushTPR()
	case kvm.ExitSetTPR:
		m.incomplete = false
		m.observe(ExitRecord{Kind: KindSetTPR, Data: m.run.CR8})
	case kvm.ExitShutdown:
		m.observe(ExitRecord{Kind: KindShutdown})
		m.crash("triple fault")
	case kvm.ExitInternalError:
		return m.handleInternalError()
	case kvm.ExitFailEntry:
		m.crash(fmt.Sprintf("KVM refused to enter the guest, hardware reason %#x", m.run.FailEntryReason()))
	default:
		m.crash(fmt.Sprintf("unexpected KVM exit reason %d", m.run.ExitReason))
	}
	return nil
}

func boolByte(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// handleIO carries out IN, OUT and the string forms, item by item.
func (m *Machine) handleIO() error {
	e := m.run.IO()
	data := m.vcpu.IOData(e)
	size := int(e.Size)
	if data == nil || size != 1 && size != 2 && size != 4 {
		return fmt.Errorf("vmm: KVM reports an I/O exit of %d items of %d bytes at offset %d", e.Count, e.Size, e.DataOffset)
	}
	port, out := uint64(e.Port), e.Out != 0
	if m.ports.NeedsTime(port, out) {
		m.advance()
	}
	for ; len(data) > 0; data = data[size:] {
		r := ExitRecord{Kind: KindIn, Addr: port, Size: size}
		if out {
			r.Kind, r.Data = KindOut, loadLE(data, size)
			m.observe(r)
			m.ports.Write(port, size, r.Data)
		} else {
			r.Data = m.ports.Read(port, size)
			storeLE(data, size, r.Data)
			m.observe(r)
		}
	}
	return nil
}

// handleMMIO carries out an access to a guest-physical address that is not RAM.
func (m *Machine) handleMMIO() {
	e := m.run.MMIO()
	size := int(min(e.Len, 8))
	write := e.Write != 0
	if m.mmio.NeedsTime(e.Addr, write) {
		m.advance()
	}
	if write {
		v := loadLE(e.Data[:], size)
		m.observe(ExitRecord{Kind: KindMMIOWrite, Addr: e.Addr, Size: size, Data: v})
		m.mmioWrite(e.Addr, size, v)
		m.pushTPR()
		return
	}
	v := m.mmioRead(e.Addr, size)
	storeLE(e.Data[:], size, v)
	m.observe(ExitRecord{Kind: KindMMIORead, Addr: e.Addr, Size: size, Data: v})
}

// Devices see accesses of 1, 2, 4 and 8 bytes; other lengths (an unaligned access that
// crosses a page, say) are split.
func (m *Machine) mmioRead(addr uint64, size int) (v uint64) {
	if size&(size-1) == 0 {
		return m.mmio.Read(addr, size)
	}
	for i := range size {
		v |= m.mmio.Read(addr+uint64(i), 1) & 0xff << (8 * i)
	}
	return v
}

func (m *Machine) mmioWrite(addr uint64, size int, v uint64) {
	if size&(size-1) == 0 {
		m.mmio.Write(addr, size, v)
		return
	}
	for i := range size {
		m.mmio.Write(addr+uint64(i), 1, v>>(8*i)&0xff)
	}
}

func loadLE(p []byte, size int) uint64 {
	switch size {
	case 1:
		return uint64(p[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(p))
	case 4:
		return uint64(binary.LittleEndian.Uint32(p))
	}
	var b [8]byte
	copy(b[:size], p)
	return binary.LittleEndian.Uint64(b[:])
}

func storeLE(p []byte, size int, v uint64) {
	switch size {
	case 1:
		p[0] = byte(v)
	case 2:
		binary.LittleEndian.PutUint16(p, uint16(v))
	case 4:
		binary.LittleEndian.PutUint32(p, uint32(v))
	default:
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], v)
		copy(p[:size], b[:])
	}
}

// waitHalted waits in a HLT, in rounds, until an interrupt is due or the machine ends. A
// guest that halts with interrupts off waits for an NMI, a reset or the user.
func (m *Machine) waitHalted() error {
	for m.exit == nil && m.halted {
		if _, _, ok := m.apic.Pending(); ok && m.run.IfFlag != 0 || m.nmi {
			m.halted = false
			return nil
		}
		if m.resetWanted || m.stopWanted {
			return nil
		}
		m.source.Wait(m.pos, m.clock.Next())
		if m.fresh {
			return nil
		}
		if m.bell.answer() || m.commandsRung {
			m.commandsRung = false
			if err := m.commands(); err != nil {
				return err
			}
			if m.exit != nil || !m.halted || m.fresh { // a reset ends the wait too
				return nil
			}
		}
		m.pos.Round++
		m.takeInputs()
		if m.fresh {
			return nil
		}
	}
	return nil
}
