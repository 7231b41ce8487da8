package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// The numbers and layouts of this package are those of the kernel's own header, as the C
// compiler sees it.
func TestLayoutsAndNumbersMatchTheKernelHeader(t *testing.T) {
	var r Run
	var io IOExit
	var mm MMIOExit
	var ms MSRExit
	var in InternalExit
	off := func(base, field unsafe.Pointer) uintptr { return uintptr(field) - uintptr(base) }
	b := unsafe.Pointer(&r)
	checks := []struct {
		c    string
		want uintptr
	}{
		{"sizeof(struct kvm_regs)", unsafe.Sizeof(Regs{})},
		{"sizeof(struct kvm_sregs)", unsafe.Sizeof(Sregs{})},
		{"sizeof(struct kvm_segment)", unsafe.Sizeof(Segment{})},
		{"sizeof(struct kvm_vcpu_events)", unsafe.Sizeof(Events{})},
		{"sizeof(struct kvm_debugregs)", unsafe.Sizeof(DebugRegs{})},
		{"sizeof(struct kvm_xcrs)", unsafe.Sizeof(xcrs{})},
		{"sizeof(struct kvm_enable_cap)", unsafe.Sizeof(enableCap{})},
		{"sizeof(struct kvm_msr_filter)", unsafe.Sizeof(msrFilter{})},
		{"sizeof(struct kvm_msr_entry)", unsafe.Sizeof(MSREntry{})},
		{"sizeof(struct kvm_cpuid_entry2)", unsafe.Sizeof(CPUIDEntry{})},
		{"sizeof(struct kvm_sync_regs)", unsafe.Sizeof(SyncRegs{})},
		{"offsetof(struct kvm_run, immediate_exit)", off(b, unsafe.Pointer(&r.immediateExit))},
		{"offsetof(struct kvm_run, exit_reason)", off(b, unsafe.Pointer(&r.ExitReason))},
		{"offsetof(struct kvm_run, ready_for_interrupt_injection)", off(b, unsafe.Pointer(&r.ReadyForInterruptInjection))},
		{"offsetof(struct kvm_run, if_flag)", off(b, unsafe.Pointer(&r.IfFlag))},
		{"offsetof(struct kvm_run, cr8)", off(b, unsafe.Pointer(&r.CR8))},
		{"offsetof(struct kvm_run, io)", off(b, unsafe.Pointer(&r.union))},
		{"offsetof(struct kvm_run, kvm_valid_regs)", off(b, unsafe.Pointer(&r.ValidRegs))},
		{"offsetof(struct kvm_run, s)", off(b, unsafe.Pointer(&r.Sync))},
		{"offsetof(struct kvm_run, io.data_offset) - offsetof(struct kvm_run, io)", unsafe.Offsetof(io.DataOffset)},
		{"offsetof(struct kvm_run, mmio.len) - offsetof(struct kvm_run, mmio)", unsafe.Offsetof(mm.Len)},
		{"offsetof(struct kvm_run, mmio.is_write) - offsetof(struct kvm_run, mmio)", unsafe.Offsetof(mm.Write)},
		{"offsetof(struct kvm_run, msr.data) - offsetof(struct kvm_run, msr)", unsafe.Offsetof(ms.Data)},
		{"offsetof(struct kvm_run, emulation_failure.insn_bytes) - offsetof(struct kvm_run, io)", unsafe.Offsetof(in.InsnBytes)},
		{"KVM_GET_API_VERSION", ioGetAPIVersion}, {"KVM_CREATE_VM", ioCreateVM}, {"KVM_CHECK_EXTENSION", ioCheckExtension},
		{"KVM_GET_VCPU_MMAP_SIZE", ioGetVCPUMmapSize}, {"KVM_GET_SUPPORTED_CPUID", ioGetSupportedCPUID},
		{"KVM_CREATE_VCPU", ioCreateVCPU}, {"KVM_GET_DIRTY_LOG", ioGetDirtyLog},
		{"KVM_SET_USER_MEMORY_REGION", ioSetUserMemoryRegion}, {"KVM_SET_TSS_ADDR", ioSetTSSAddr},
		{"KVM_SET_IDENTITY_MAP_ADDR", ioSetIdentityMapAddr}, {"KVM_RUN", ioRun},
		{"KVM_GET_REGS", ioGetRegs}, {"KVM_SET_REGS", ioSetRegs}, {"KVM_GET_SREGS", ioGetSregs}, {"KVM_SET_SREGS", ioSetSregs},
		{"KVM_INTERRUPT", ioInterrupt}, {"KVM_GET_MSRS", ioGetMSRs}, {"KVM_SET_MSRS", ioSetMSRs}, {"KVM_SET_CPUID2", ioSetCPUID2},
		{"KVM_GET_MP_STATE", ioGetMPState}, {"KVM_SET_MP_STATE", ioSetMPState}, {"KVM_NMI", ioNMI},
		{"KVM_GET_VCPU_EVENTS", ioGetVCPUEvents}, {"KVM_SET_VCPU_EVENTS", ioSetVCPUEvents},
		{"KVM_GET_DEBUGREGS", ioGetDebugRegs}, {"KVM_SET_DEBUGREGS", ioSetDebugRegs}, {"KVM_ENABLE_CAP", ioEnableCap},
		{"KVM_GET_XSAVE", ioGetXSave}, {"KVM_SET_XSAVE", ioSetXSave}, {"KVM_GET_XCRS", ioGetXCRS}, {"KVM_SET_XCRS", ioSetXCRS},
		{"KVM_X86_SET_MSR_FILTER", ioSetMSRFilter}, {"KVM_GET_XSAVE2", ioGetXSave2},
		{"KVM_CAP_SYNC_REGS", CapSyncRegs}, {"KVM_CAP_IMMEDIATE_EXIT", CapImmediateExit}, {"KVM_CAP_X86_USER_SPACE_MSR", CapX86UserSpaceMSR},
		{"KVM_CAP_X86_MSR_FILTER", CapX86MSRFilter}, {"KVM_CAP_XSAVE2", CapXSave2}, {"KVM_CAP_TSC_CONTROL", CapTSCControl},
		{"KVM_CAP_SET_IDENTITY_MAP_ADDR", CapSetIdentityMapAddr}, {"KVM_CAP_DEBUGREGS", CapDebugRegs}, {"KVM_CAP_XCRS", CapXCRS},
		{"sizeof(struct kvm_guest_debug)", unsafe.Sizeof(guestDebug{})}, {"KVM_SET_GUEST_DEBUG", ioSetGuestDebug},
		{"KVM_GUESTDBG_ENABLE", guestDebugEnable}, {"KVM_GUESTDBG_SINGLESTEP", guestDebugSingleStep}, {"KVM_GUESTDBG_USE_HW_BP", guestDebugHardware}, {"KVM_EXIT_DEBUG", ExitDebug},
		{"KVM_GET_STATS_FD", ioGetStatsFD}, {"KVM_CAP_BINARY_STATS_FD", CapBinaryStatsFD},
		{"sizeof(struct kvm_stats_header)", unsafe.Sizeof(statsHeader{})}, {"sizeof(struct kvm_stats_desc)", unsafe.Sizeof(statsDesc{})},
		{"offsetof(struct kvm_stats_header, desc_offset)", unsafe.Offsetof(statsHeader{}.descOffset)},
		{"offsetof(struct kvm_stats_header, data_offset)", unsafe.Offsetof(statsHeader{}.dataOffset)},
		{"offsetof(struct kvm_stats_desc, offset)", unsafe.Offsetof(statsDesc{}.offset)},
		{"KVM_EXIT_RDMSR_OR", ExitRDMSR},
		{"KVM_EXIT_IO", ExitIO}, {"KVM_EXIT_MMIO", ExitMMIO}, {"KVM_EXIT_HLT", ExitHLT}, {"KVM_EXIT_SET_TPR", ExitSetTPR},
		{"KVM_EXIT_X86_WRMSR", ExitWRMSR}, {"KVM_EXIT_INTERNAL_ERROR", ExitInternalError}, {"KVM_EXIT_SHUTDOWN", ExitShutdown},
		{"KVM_EXIT_IRQ_WINDOW_OPEN", ExitIRQWindowOpen}, {"KVM_EXIT_FAIL_ENTRY", ExitFailEntry},
	}
	var src strings.Builder
	src.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\n#define KVM_EXIT_RDMSR_OR KVM_EXIT_X86_RDMSR\nint main(void){\n")
	for _, c := range checks {
		fmt.Fprintf(&src, "printf(\"%%lu\\n\", (unsigned long)(%s));\n", c.c)
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
	require.Len(t, lines, len(checks))
	for i, c := range checks {
		require.Equal(t, fmt.Sprint(c.want), lines[i], c.c)
	}
}

func TestOpenTellsMissingFromForbidden(t *testing.T) {
	_, err := Open(filepath.Join(t.TempDir(), "kvm"))
	require.ErrorIs(t, err, ErrNoKVM)
	f := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(f, nil, 0o600))
	_, err = Open(f)
	require.ErrorIs(t, err, ErrNoKVM, "a plain file is not KVM")
}
