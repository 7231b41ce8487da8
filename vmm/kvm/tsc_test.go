package kvm

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// The offset is what KVM keeps, where it has the attribute; the rate is the host's until it is set.
func TestTSCOffsetIsKept(t *testing.T) {
	sys, err := Open("/dev/kvm")
	require.NoError(t, err)
	defer sys.Close()
	vm, err := sys.CreateVM()
	require.NoError(t, err)
	defer vm.Close()
	v, err := vm.CreateVCPU(0)
	require.NoError(t, err)
	defer v.Close()
	rate, err := v.TSCKHz()
	require.NoError(t, err)
	require.Greater(t, rate, uint32(100_000), "of any processor since 2003")
	if !v.HasTSCOffset() {
		t.Log("this KVM has no KVM_VCPU_TSC_OFFSET")
		_, err := v.TSCOffset()
		require.Error(t, err)
		return
	}
	if sys.Check(CapTSCControl) == 0 {
		// KVM-PVM has the attribute and forgets the value: who uses it must look.
		t.Log("this KVM has no KVM_CAP_TSC_CONTROL")
		require.NoError(t, v.SetTSCOffset(1<<40))
		return
	}
	for _, want := range []uint64{0, 1 << 40, 1<<64 - 1} {
		require.NoError(t, v.SetTSCOffset(want))
		got, err := v.TSCOffset()
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	t.Logf("%d kHz, KVM_CAP_TSC_CONTROL %d", rate, sys.Check(CapTSCControl))
}
