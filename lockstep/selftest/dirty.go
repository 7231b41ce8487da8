package selftest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/ftvmm/ftvmm/vmm/kvm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// The programs of the dirty log's probe, 64-bit: touch a byte of each page in the list at RSI, RCX entries, then
// write to RDX, where no memory is. mmioExit is that place.
var (
	writePages = touchPages(0xfe, 0x00) // inc byte [rax]
	readPages  = touchPages(0x8a, 0x18) // mov bl, [rax]
)

const (
	listAt   = 0x10000 // of pages to touch
	mmioExit = 512 << 20

	dirtyRounds = 6
	dirtyPages  = dataSize / memory.PageSize
)

func touchPages(op, modrm byte) []byte {
	return []byte{
		0x48, 0x8b, 0x06, // 1: mov rax, [rsi]
		0x48, 0x83, 0xc6, 8, // add rsi, 8
		op, modrm,
		0xff, 0xc9, // dec ecx
		0x75, 0xf3, // jnz 1b
		0x89, 0x02, // mov [rdx], eax
		0xeb, 0xfe, // jmp $
	}
}

// dirtyLog checks that the kernel reports the pages that a guest has written, and no others: at CPL 0 and
// CPL 3, round after round.
func dirtyLog(ctx context.Context, e *Env) Row {
	rng := rand.New(rand.NewPCG(e.Seed, 1))
	written, extra := 0, 0
	for _, cpl := range []uint8{0, 3} {
		n, more, err := dirtyProbe(ctx, e, cpl, rng)
		written += n
		extra += more
		var missed *missedPages
		switch {
		case errors.As(err, &missed):
			return Row{
				State: Error, Code: "dirty-log-misses", Found: fmt.Sprintf("at CPL %d: %v", cpl, missed),
				Meaning: "a state sync would leave pages behind: no guest can be protected at level 3",
				Remedy:  newerKernel,
			}
		case err != nil:
			return Row{
				State: Error, Code: "dirty-log-fails", Found: fmt.Sprintf("at CPL %d: %v", cpl, err),
				Meaning: "the pages that a guest writes are not known: no guest can be protected at level 3",
				Remedy:  newerKernel,
			}
		}
	}
	if extra > 0 {
		return Row{
			State: Warning, Code: "dirty-log-extra", Found: fmt.Sprintf("all of %d written pages are reported, and %d that were not written", written, extra),
			Meaning: "a state sync copies more than it must", Remedy: "none is needed",
		}
	}
	return Row{
		State: Good, Code: "dirty-log-exact",
		Found:   fmt.Sprintf("%d written pages of %d, at CPL 0 and 3, are reported in their round, and no others", written, 2*dirtyRounds*dirtyPages),
		Meaning: "a state sync copies what was written and nothing else",
	}
}

// missedPages are pages that were written and are not in the log.
type missedPages struct{ round, written, missed, first int }

func (m *missedPages) Error() string {
	return fmt.Sprintf("in round %d, %d of %d written pages are not reported, the first %#x", m.round, m.missed, m.written, dataBase+m.first*memory.PageSize)
}

// dirtyProbe returns how many pages were written, and how many more the log reported.
func dirtyProbe(ctx context.Context, e *Env, cpl uint8, rng *rand.Rand) (written, extra int, err error) {
	p, err := newProbe(e.KVM, nil, probeOptions{data: kvm.MemLogDirtyPages})
	if err != nil {
		return 0, 0, err
	}
	defer p.close()
	if err := p.longMode(cpl); err != nil {
		return 0, 0, err
	}
	data := p.mem.Regions()[1].Bytes
	want := make([]byte, dirtyPages) // how often each page was incremented
	bitmap := make([]uint64, dirtyPages/64)
	// KVM maps a page that is read for the first time writable, if it may, and reports it as written. So all pages are
	// read, and the log emptied, before the rounds that count; and they are made before that, because what the kernel
	// replaces (its page of zeros, at the first write) is mapped anew.
	for i := range dirtyPages {
		data[i*memory.PageSize+1] = 1
	}
	if err := errors.Join(p.touch(readPages, rng.Perm(dirtyPages)), p.vm.DirtyLog(dataSlot, bitmap)); err != nil {
		return 0, 0, err
	}
	for round := range dirtyRounds {
		if err := ctx.Err(); err != nil {
			return written, extra, err
		}
		// From few pages to nearly all; none in the last round.
		n := 1 << (2 * round)
		if round == dirtyRounds-1 {
			n = 0
		}
		pages := rng.Perm(dirtyPages)
		writes, reads := pages[:n], pages[n:n+min(64, dirtyPages-n)]
		if err := p.touch(readPages, reads); err != nil {
			return written, extra, err
		}
		if n > 0 {
			if err := p.touch(writePages, writes); err != nil {
				return written, extra, err
			}
		}
		clear(bitmap)
		if err := p.vm.DirtyLog(dataSlot, bitmap); err != nil {
			return written, extra, err
		}
		missed, more := judge(bitmap, writes)
		for _, i := range writes {
			want[i]++
		}
		for i := range dirtyPages {
			if got := data[i*memory.PageSize]; got != want[i] {
				return written, extra, fmt.Errorf("page %#x holds %d after %d writes", dataBase+i*memory.PageSize, got, want[i])
			}
		}
		extra += len(more)
		if len(missed) > 0 {
			return written, extra, &missedPages{round: round, written: n, missed: len(missed), first: missed[0]}
		}
		written += n
	}
	return written, extra, nil
}

// judge compares a log with the pages that were written: those that it misses, and those that it has beyond
// them, both ascending.
func judge(bitmap []uint64, writes []int) (missed, extra []int) {
	sorted := slices.Sorted(slices.Values(writes))
	for i := range 64 * len(bitmap) {
		reported := bitmap[i/64]>>(i%64)&1 == 1
		_, wrote := slices.BinarySearch(sorted, i)
		switch {
		case wrote && !reported:
			missed = append(missed, i)
		case reported && !wrote:
			extra = append(extra, i)
		}
	}
	return missed, extra
}

// touch runs one of the two programs over pages of the data slot.
func (p *probe) touch(code []byte, pages []int) error {
	list := make([]byte, 0, 8*len(pages))
	for _, page := range pages {
		list = binary.LittleEndian.AppendUint64(list, dataBase+uint64(page)*memory.PageSize)
	}
	if err := errors.Join(p.mem.Write(probeCode, code), p.mem.Write(listAt, list)); err != nil {
		return err
	}
	err := p.vcpu.SetRegs(&kvm.Regs{RIP: probeCode, RFLAGS: 2, RSI: listAt, RCX: uint64(len(pages)), RDX: mmioExit})
	if err != nil {
		return err
	}
	if err := p.expect(kvm.ExitMMIO); err != nil {
		return err
	}
	if m := p.page.MMIO(); m.Addr != mmioExit || m.Write != 1 {
		return fmt.Errorf("the probe accesses %#x, want a write to %#x", m.Addr, uint64(mmioExit))
	}
	return p.complete()
}
