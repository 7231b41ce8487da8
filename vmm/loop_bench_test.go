package vmm

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// benchMachine is a machine as it runs unprotected guests, which is never entered.
func benchMachine(tb testing.TB) *Machine {
	tb.Helper()
	m, err := New(Config{Memory: 4 << 20, Kernel: []byte{0xf4}, KernelKind: boot.Flat, Serial: []Console{nil}}) // HLT
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, m.Close()) })
	return m
}

// exits are kinds of exit, each as KVM leaves it on the run page.
var exits = []struct {
	name string
	set  func(m *Machine)
}{
	{"out", func(m *Machine) { setIO(m, 0x80, true) }},             // POST code
	{"in", func(m *Machine) { setIO(m, 0x3fd, false) }},            // line status of COM1
	{"in-time", func(m *Machine) { setIO(m, 0x608, false) }},       // PM timer: reads the clock
	{"serial", func(m *Machine) { setIO(m, 0x3f8, true) }},         // a byte of output
	{"mmio-read", func(m *Machine) { setMMIO(m, 0xfee00030, 0) }},  // the local APIC's version
	{"mmio-write", func(m *Machine) { setMMIO(m, 0xfec00000, 1) }}, // the I/O APIC's index
	{"apic-timer", func(m *Machine) { setMMIO(m, 0xfee00390, 0) }}, // its current count
	{"apic-eoi", func(m *Machine) { setMMIO(m, 0xfee000b0, 1) }},   // end of interrupt
	{"rdmsr", func(m *Machine) { setMSR(m, kvm.ExitRDMSR, 0x1b) }}, // IA32_APIC_BASE
	{"unclaimed", func(m *Machine) { setMMIO(m, 0xd0000000, 0) }},  // nobody's address
	{"rep-outs", func(m *Machine) { setIO(m, 0x80, true); m.run.IO().Count = 8 }},
}

const ioData = 4096 // where KVM puts the data of port accesses: the page after struct kvm_run

func setIO(m *Machine, port uint16, out bool) {
	m.run.ExitReason = kvm.ExitIO
	e := m.run.IO()
	*e = kvm.IOExit{Size: 1, Port: port, Count: 1, DataOffset: ioData}
	if out {
		e.Out = 1
	}
}

func setMMIO(m *Machine, addr uint64, write uint8) {
	m.run.ExitReason = kvm.ExitMMIO
	*m.run.MMIO() = kvm.MMIOExit{Addr: addr, Len: 4, Write: write}
}

func setMSR(m *Machine, reason uint32, index uint32) {
	m.run.ExitReason = reason
	*m.run.MSR() = kvm.MSRExit{Index: index}
}

// turn is one turn of [Machine.loop] without KVM_RUN.
func turn(tb testing.TB, m *Machine, set func(*Machine)) {
	if m.bell.answer() {
		if err := m.attend(); err != nil {
			tb.Fatal(err)
		}
	}
	if again, err := m.deliver(); again || err != nil {
		tb.Fatal("an interrupt is due where none can be", err)
	}
	m.source.Arm(m.clock.Next())
	m.slice.enter()
	if !m.bell.enter() {
		return
	}
	set(m)
	m.bell.left()
	if err := m.left(0); err != nil {
		tb.Fatal(err)
	}
	if m.exit != nil {
		tb.Fatal(m.exit)
	}
}

// BenchmarkExit measures what the vCPU loop adds to an exit outside KVM_RUN.
func BenchmarkExit(b *testing.B) {
	for _, e := range exits {
		b.Run(e.name, func(b *testing.B) {
			m := benchMachine(b)
			m.source.Resume()
			b.ReportAllocs()
			for b.Loop() {
				turn(b, m, e.set)
			}
		})
	}
}

func TestExitsDoNotAllocate(t *testing.T) {
	for _, e := range exits {
		t.Run(e.name, func(t *testing.T) {
			m := benchMachine(t)
			m.source.Resume()
			require.Zero(t, testing.AllocsPerRun(1000, func() { turn(t, m, e.set) }))
		})
	}
}
