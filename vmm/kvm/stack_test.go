package kvm

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// deep calls f with the stack about n frames of 64 bytes fuller.
//
//go:noinline
func deep(n int, f func()) byte {
	var frame [64]byte
	if n == 0 {
		f()
		return frame[0]
	}
	frame[n%len(frame)] = deep(n-1, f)
	return frame[0]
}

// What the kernel writes arrives, wherever the goroutine's stack ends: the runtime moves a stack that
// grows, also between the making of a system call's argument and the call.
func TestAnswersArriveWhenTheStackGrows(t *testing.T) {
	if unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) != nil {
		t.Skip("this host has no usable /dev/kvm")
	}
	s, err := Open("/dev/kvm")
	require.NoError(t, err)
	defer s.Close()
	vm, err := s.CreateVM()
	require.NoError(t, err)
	defer vm.Close()
	v, err := vm.CreateVCPU(0)
	require.NoError(t, err)
	defer v.Close()
	wantTable, err := s.SupportedCPUID()
	require.NoError(t, err)
	wantRegs, err := v.Regs()
	require.NoError(t, err)
	require.NotZero(t, wantRegs.RIP)
	for depth := range 600 {
		done := make(chan struct{})
		go func() { // each with a new, small stack
			defer close(done)
			deep(depth, func() {
				if r, err := v.Regs(); err != nil || r != wantRegs {
					t.Errorf("depth %d: registers %+v, want %+v (%v)", depth, r, wantRegs, err)
				}
			})
		}()
		<-done
		done = make(chan struct{})
		go func() {
			defer close(done)
			deep(depth, func() {
				if table, err := s.SupportedCPUID(); err != nil || len(table) != len(wantTable) {
					t.Errorf("depth %d: %d entries of CPUID, want %d (%v)", depth, len(table), len(wantTable), err)
				}
			})
		}()
		<-done
		if t.Failed() {
			return
		}
	}
}
