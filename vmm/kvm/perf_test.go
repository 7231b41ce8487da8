package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// requireC checks numbers against C expressions, as the compiler sees them in the kernel's headers.
func requireC(t *testing.T, includes string, want map[string]uintptr) {
	var src strings.Builder
	src.WriteString("#define _GNU_SOURCE\n#include <stdio.h>\n#include <stddef.h>\n" + includes + "\nint main(void){\n")
	var names []string
	for c := range want {
		names = append(names, c)
		fmt.Fprintf(&src, "printf(\"%%lu\\n\", (unsigned long)(%s));\n", c)
	}
	src.WriteString("return 0;}\n")
	dir := t.TempDir()
	file, bin := filepath.Join(dir, "l.c"), filepath.Join(dir, "l")
	require.NoError(t, os.WriteFile(file, []byte(src.String()), 0o600))
	out, err := exec.Command("gcc", "-o", bin, file).CombinedOutput()
	require.NoError(t, err, "gcc is needed (./build.sh deps): %s", out)
	out, err = exec.Command(bin).Output()
	require.NoError(t, err)
	lines := strings.Fields(string(out))
	require.Len(t, lines, len(names))
	for i, c := range names {
		require.Equal(t, fmt.Sprint(want[c]), lines[i], c)
	}
}

func TestPerfAndTSCLayoutsMatchTheHeaders(t *testing.T) {
	var d DebugExit
	var a deviceAttr
	requireC(t, "#include <fcntl.h>\n#include <linux/kvm.h>\n#include <linux/perf_event.h>", map[string]uintptr{
		"sizeof(struct f_owner_ex)":                 unsafe.Sizeof(ownerEx{}),
		"F_OWNER_TID":                               ownerTID,
		"PERF_EVENT_IOC_PERIOD":                     unix.PERF_EVENT_IOC_PERIOD,
		"sizeof(struct kvm_debug_exit_arch)":        unsafe.Sizeof(d),
		"offsetof(struct kvm_debug_exit_arch, pc)":  unsafe.Offsetof(d.PC),
		"offsetof(struct kvm_debug_exit_arch, dr6)": unsafe.Offsetof(d.DR6),
		"sizeof(struct kvm_device_attr)":            unsafe.Sizeof(a),
		"offsetof(struct kvm_device_attr, group)":   unsafe.Offsetof(a.group),
		"offsetof(struct kvm_device_attr, attr)":    unsafe.Offsetof(a.attr),
		"offsetof(struct kvm_device_attr, addr)":    unsafe.Offsetof(a.addr),
		"KVM_CAP_PMU_CAPABILITY":                    CapPMUCapability,
		"KVM_PMU_CAP_DISABLE":                       pmuDisable,
		"KVM_SET_TSC_KHZ":                           ioSetTSCKHz,
		"KVM_GET_TSC_KHZ":                           ioGetTSCKHz,
		"KVM_SET_DEVICE_ATTR":                       ioSetDeviceAttr,
		"KVM_GET_DEVICE_ATTR":                       ioGetDeviceAttr,
		"KVM_HAS_DEVICE_ATTR":                       ioHasDeviceAttr,
		"KVM_VCPU_TSC_CTRL":                         vcpuTSCCtrl,
		"KVM_VCPU_TSC_OFFSET":                       vcpuTSCOffset,
	})
}

// A software event stands in for the hardware one, which this machine may not have: the file, the period, the signal and
// its thread are the same code in the kernel.
func TestAnEventCountsAndSignalsItsThread(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const sig = unix.Signal(40) // a real-time signal, which nobody else sends
	var set, old unix.Sigset_t
	set.Val[0] = 1 << (sig - 1)
	require.NoError(t, unix.PthreadSigmask(unix.SIG_BLOCK, &set, &old))
	defer func() { require.NoError(t, unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)) }()
	// taken says whether the signal waits on this thread, and takes it.
	taken := func() bool {
		var info [128]byte
		var now unix.Timespec
		_, _, errno := unix.Syscall6(unix.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&set)), uintptr(unsafe.Pointer(&info)),
			uintptr(unsafe.Pointer(&now)), 8, 0, 0)
		code := *(*int32)(unsafe.Pointer(&info[8]))
		const pollIn = 1 // POLL_IN
		return errno == 0 && code == pollIn
	}

	const pages = 64
	p, err := openEvent(&unix.PerfEventAttr{
		Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_PAGE_FAULTS, Sample: pages * 5 / 2, Bits: unix.PerfBitDisabled,
	}, sig)
	require.NoError(t, err)
	defer p.Close()
	touch := func() uint64 {
		before, err := p.Value()
		require.NoError(t, err)
		b, err := unix.Mmap(-1, 0, pages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		require.NoError(t, err)
		defer func() { require.NoError(t, unix.Munmap(b)) }()
		require.NoError(t, unix.Madvise(b, unix.MADV_NOHUGEPAGE))
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		after, err := p.Value()
		require.NoError(t, err)
		return after - before
	}
	for range 2 {
		require.GreaterOrEqual(t, touch(), uint64(pages))
		require.False(t, taken(), "no period has ended")
	}
	touch()
	require.True(t, taken(), "a period has ended")
	require.NoError(t, p.SetPeriod(MaxPeriod))
	require.NoError(t, p.SetPeriod(1))
	require.Error(t, p.SetPeriod(0))
}

// What this host cannot count is told apart from what this user may not count.
func TestAMissingCounterIsAFeature(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_, err := openEvent(&unix.PerfEventAttr{Type: 0x7fffffff, Sample: MaxPeriod}, unix.SIGURG)
	require.ErrorIs(t, err, ErrFeature)
	p, err := OpenGuestEvent(0x5100d1, unix.SIGURG)
	if err != nil {
		t.Log(err)
		require.True(t, strings.Contains(err.Error(), "perf_event_open"))
		return
	}
	defer p.Close()
	v, err := p.Value()
	require.NoError(t, err)
	require.Zero(t, v, "no guest has run on this thread")
}
