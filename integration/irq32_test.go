package integration

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/vmm"
)

// Interrupts reach handlers of 32-bit code and return from them, also on a host whose KVM can
// do neither; the exit code of the guest is the number of the check that failed.
func TestInterruptsInProtectedMode(t *testing.T) {
	image, err := guests.Image("irq32.bin")
	require.NoError(t, err)
	stack := []byte{0x00, 0x20, 0x0a, 0x00} // its ESP, which as a linear address is no RAM
	require.Equal(t, 2, bytes.Count(image, stack))
	for name, kernel := range map[string][]byte{
		"offset beyond RAM": image,
		"offset in RAM":     bytes.ReplaceAll(image, stack, []byte{0x00, 0x00, 0x09, 0x00}),
	} {
		t.Run(name, func(t *testing.T) {
			m := start(t, vmm.Config{Memory: 16 << 20, Kernel: kernel, KernelKind: boot.Flat})
			require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, m.wait(t))
		})
	}
}

// An interrupt that the guest has no usable handler for is a triple fault, and stays one.
func TestInterruptWithoutAHandlerIsATripleFault(t *testing.T) {
	const movAL, gate = 0xb0, 0x8e // MOV AL, the type of the guest's gate
	for name, typ := range map[string]byte{
		"not present": 0x0e,
		"of no type":  0x88,
		"a TSS":       0x8b,
	} {
		t.Run(name, func(t *testing.T) {
			kernel, err := guests.Image("irq32.bin")
			require.NoError(t, err)
			require.Equal(t, 1, bytes.Count(kernel, []byte{movAL, gate}))
			kernel = bytes.Replace(kernel, []byte{movAL, gate}, []byte{movAL, typ}, 1)
			m := start(t, vmm.Config{Memory: 16 << 20, Kernel: kernel, KernelKind: boot.Flat})
			end := m.wait(t)
			require.Equal(t, vmm.ExitCrash, end.Reason, "%+v", end)
			require.Contains(t, end.Detail, "triple fault")
		})
	}
}
