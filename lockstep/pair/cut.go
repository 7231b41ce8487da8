package pair

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/zeebo/xxh3"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/lockstep/announce"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/pages"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
)

// Limits of copies.
const (
	// copyAhead is how much of a copy may be on its way, in bytes: what comes behind it waits so long.
	copyAhead = 2 << 20
	// maxRounds and enoughPages end a pre-copy: after so many rounds, or when so few pages are left, the cut takes the rest.
	maxRounds   = 5
	enoughPages = 1024
	// diskPiece is how much of a disk is read at once, in bytes.
	diskPiece = pages.MaxExtent
	// maxCutWrites bounds the disk writes that a cut carries, in bytes.
	maxCutWrites = 256 << 20
)

// errGone ends a copy that is no longer wanted.
var errGone = errors.New("pair: the copy was given up")

// cutState is what a cut carries beside pages.
type cutState struct {
	Machine  []byte // vmm.State
	Learners []announce.State
	Writes   [][]byte // chunks of extents
	// Memory is a hash of all memory, with Options.VerifyCuts; State one of Machine.
	Memory *pages.Sum
}

// cutBuffer is what a primary keeps of a cut until the backup has it: the pages as they were.
type cutBuffer struct {
	set   pages.Set
	bytes []byte
	index map[uint64]int
}

func (b *cutBuffer) page(pfn uint64) []byte {
	i, ok := b.index[pfn]
	if !ok {
		return nil
	}
	return b.bytes[i*pages.Size:][:pages.Size]
}

// staged is a cut that a backup is receiving.
type staged struct {
	came     time.Time // when its head came
	machine  *vmm.State
	memory   *pages.Sum
	learners []announce.State
	writes   [][]byte
	pages    map[uint64][]byte
}

// worker carries out what takes long.
func (p *Pair) worker() {
	for {
		select {
		case f := <-p.work:
			f()
		case <-p.ctx.Done():
			return
		}
	}
}

// beside has the worker run f after what it has to do. A failure ends the session: the other side goes on, and this one
// is copied anew.
func (p *Pair) beside(f func(gen uint64) error) {
	gen, conn := p.gen.Load(), p.conn
	p.work <- func() {
		if p.gen.Load() != gen {
			return
		}
		if err := f(gen); err != nil && !errors.Is(err, errGone) {
			p.post(func() { p.violation(conn, err) })
		}
	}
}

// loop has the live machine's loop run f, and waits for it.
func (p *Pair) loop(f func() error) error {
	done := make(chan error, 1)
	if !p.m.Go(func() error { done <- f(); return nil }) {
		return errors.New("pair: the machine does not answer")
	}
	select {
	case err := <-done:
		return err
	case <-p.ctx.Done():
		return errGone
	}
}

// pageFrames returns the number of page frames up to the end of the guest's memory.
func (p *Pair) pageFrames() uint64 {
	r := p.m.Memory().Regions()
	return r[len(r)-1].End() / pages.Size
}

func (p *Pair) page(pfn uint64) []byte {
	b, err := p.m.Memory().View(pfn*pages.Size, pages.Size)
	if err != nil {
		panic(fmt.Sprintf("pair: page frame %#x: %v", pfn, err)) // the callers know what there is
	}
	return b
}

// all calls f with each page frame of the guest, in ascending order.
func (p *Pair) all(f func(i int, pfn uint64) error) error {
	i := 0
	for _, r := range p.m.Memory().Regions() {
		for n := range uint64(len(r.Bytes) / pages.Size) {
			if err := f(i, r.Base/pages.Size+n); err != nil {
				return err
			}
			i++
		}
	}
	return nil
}

// whole hashes all memory. On the vCPU loop.
func (p *Pair) whole() pages.Sum {
	var list []byte
	_ = p.all(func(_ int, pfn uint64) error {
		s := pages.Hash(p.page(pfn))
		list = binary.LittleEndian.AppendUint64(list, s.Hi)
		list = binary.LittleEndian.AppendUint64(list, s.Lo)
		return nil
	})
	h := xxh3.Hash128(list)
	return pages.Sum{Hi: h.Hi, Lo: h.Lo}
}

// verify compares what a cut has made with what it should have made. On the vCPU loop.
func (p *Pair) verify(st *staged) error {
	if st.memory == nil {
		return nil
	}
	if sum := p.whole(); sum != *st.memory {
		return fmt.Errorf("pair: after a cut memory has the hash %v, the primary's %v", sum, *st.memory)
	}
	state, err := p.m.EncodeState()
	if err != nil {
		return err
	}
	mine, err := p.m.DecodeState(state)
	if err != nil {
		return err
	}
	return mine.Differs(st.machine)
}

// takeDirty adds to p.dirty what was written since the last call. On the vCPU loop.
func (p *Pair) takeDirty() error { return p.m.TakeDirty(p.dirty.Add) }

// --- Copying to a joining peer ------------------------------------------------------------------

// chunk sends a piece of the pre-copy, when there is room.
func (p *Pair) chunk(gen uint64, b []byte) error {
	if err := p.room(gen); err != nil {
		return err
	}
	p.post(func() {
		if p.gen.Load() == gen {
			p.node.Chunk(b)
		}
	})
	return nil
}

// room waits until the peer has taken most of what was sent.
func (p *Pair) room(gen uint64) error {
	for {
		n := 0
		ok := make(chan struct{})
		p.post(func() {
			if p.out != nil {
				n = p.out.pending()
			}
			close(ok)
		})
		select {
		case <-ok:
		case <-p.ctx.Done():
			return errGone
		}
		if p.gen.Load() != gen {
			return errGone
		}
		if n <= copyAhead {
			return nil
		}
		time.Sleep(Tick)
	}
}

// precopy sends disks and memory while the guest runs.
func (p *Pair) precopy() {
	p.beside(func(gen uint64) error {
		began := time.Now()
		d := p.world.disks
		d.setTracking(trackRanges)
		d.barrier()                     // what was on its way to a disk before has been noted nowhere: it must be there before the disk is read
		if err := p.loop(func() error { // from here on writes to memory are seen
			if err := p.takeDirty(); err != nil {
				return err
			}
			p.dirty.Clear()
			return nil
		}); err != nil {
			return err
		}
		var total, copied uint64
		for _, b := range d.backends {
			total += b.Info().Size
		}
		total += p.m.Memory().Size()
		last := time.Now()
		progress := func(n uint64) {
			if copied += n; time.Since(last) >= time.Second {
				last = time.Now()
				p.event("copy-progress", map[string]any{"bytes": copied, "total": total, "percent": copied * 100 / max(total, 1)})
			}
		}
		for i, b := range d.backends {
			if b.Info().ReadOnly {
				continue
			}
			if err := p.copyDisk(gen, i, 0, int64(b.Info().Size), progress); err != nil {
				return err
			}
		}
		p.sums = make([]pages.Sum, p.m.Memory().Size()/pages.Size)
		if err := p.copyPages(gen, p.all, progress); err != nil {
			return err
		}
		rounds := 0
		for ; rounds < maxRounds; rounds++ {
			var set pages.Set
			if err := p.loop(func() error {
				if err := p.takeDirty(); err != nil {
					return err
				}
				if set = p.dirty; set.Len() > enoughPages {
					p.dirty = pages.Set{} // else the cut takes them
				}
				return nil
			}); err != nil {
				return err
			}
			if set.Len() <= enoughPages {
				break
			}
			if err := p.copyPages(gen, p.some(&set), progress); err != nil {
				return err
			}
		}
		// From here on the cut carries what is written to disks; what was written before is
		// copied again, when it is there.
		ranges := d.setTracking(trackData)
		d.barrier()
		for _, r := range ranges {
			if err := p.copyDisk(gen, int(r.extent.Disk), r.extent.Offset, r.extent.Length, progress); err != nil {
				return err
			}
		}
		p.event("copied", map[string]any{"bytes": copied, "ms": time.Since(began).Milliseconds(), "rounds": rounds})
		p.post(func() {
			if p.gen.Load() == gen {
				p.node.PrecopyDone()
			}
		})
		return nil
	})
}

// some goes over a set like all.
func (p *Pair) some(set *pages.Set) func(func(int, uint64) error) error {
	return func(f func(int, uint64) error) error {
		return p.all(func(i int, pfn uint64) error {
			if !set.Contains(pfn) {
				return nil
			}
			return f(i, pfn)
		})
	}
}

// copyPages sends pages and keeps their hashes. The guest may change them meanwhile: then they are dirty, and come again.
func (p *Pair) copyPages(gen uint64, each func(func(int, uint64) error) error, progress func(uint64)) error {
	var w pages.PageWriter
	var page [pages.Size]byte
	flush := func() error {
		n := w.Len()
		if n == 0 {
			return nil
		}
		progress(uint64(n) * pages.Size)
		return p.chunk(gen, w.AppendChunk(nil))
	}
	err := each(func(i int, pfn uint64) error {
		copy(page[:], p.page(pfn))
		p.sums[i] = pages.Hash(page[:])
		if w.Add(pfn, page[:]) {
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		w.Add(pfn, page[:])
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// copyDisk sends a range of a disk.
func (p *Pair) copyDisk(gen uint64, disk int, offset, length int64, progress func(uint64)) error {
	var w pages.ExtentWriter
	b := p.world.disks.backends[disk]
	for length > 0 {
		n := min(length, diskPiece)
		data := make([]byte, n)
		if err := access(b, blk.Read, offset, data, n); err != nil {
			return fmt.Errorf("read disk %d for its copy: %w", disk, err)
		}
		e := pages.Extent{Disk: uint16(disk), Offset: offset, Length: n, Data: data}
		if !w.Add(e) {
			if err := p.chunk(gen, w.AppendChunk(nil)); err != nil {
				return err
			}
			w.Add(e)
		}
		progress(uint64(n))
		offset, length = offset+n, length-n
	}
	if w.Len() == 0 {
		return nil
	}
	return p.chunk(gen, w.AppendChunk(nil))
}

// --- The primary's half of a cut ----------------------------------------------------------------

// takeCut stops the guest, copies what is needed, and lets it run on in the new term.
func (p *Pair) takeCut(a protocol.TakeCut) {
	p.lastCut = time.Now()
	p.cuts++
	joined := p.sums != nil
	p.beside(func(gen uint64) error {
		peer, rest, err := pages.DecodeSet(a.Dirty, int(p.pageFrames()))
		if err != nil || len(rest) != 0 {
			return fmt.Errorf("the set of dirty pages: %w", errors.Join(err, pages.ErrFormat))
		}
		if a.Full && !joined {
			// Of what the guest does not write from now on these are the hashes at the cut.
			if err := p.loop(p.takeDirty); err != nil {
				return err
			}
			p.sums = make([]pages.Sum, p.m.Memory().Size()/pages.Size)
			_ = p.all(func(i int, pfn uint64) error {
				p.sums[i] = pages.Hash(p.page(pfn))
				return nil
			})
		}
		return p.loop(func() error { return p.cut(gen, a, &peer) })
	})
}

// cut is the part of takeCut during which the guest stands. On the vCPU loop.
func (p *Pair) cut(gen uint64, a protocol.TakeCut, peer *pages.Set) error {
	if p.gen.Load() != gen {
		return nil
	}
	began := time.Now()
	w := p.world
	w.close()
	if err := p.takeDirty(); err != nil {
		return err
	}
	set := p.dirty
	p.dirty = pages.Set{}
	set.Union(peer)
	buf := &cutBuffer{bytes: make([]byte, 0, set.Len()*pages.Size), index: make(map[uint64]int, set.Len())}
	for pfn := range set.All() {
		if !p.m.Memory().Contains(pfn*pages.Size, pages.Size) {
			return fmt.Errorf("the peer has page %#x, this guest has not", pfn)
		}
		buf.index[pfn] = len(buf.index)
		buf.bytes = append(buf.bytes, p.page(pfn)...)
	}
	buf.set = set
	writes := w.disks.since(a.Since, a.Term)
	if err := p.m.NewTerm(); err != nil {
		return err
	}
	w.newTerm()
	state, err := p.m.EncodeState()
	if err != nil {
		return err
	}
	s := cutState{Machine: state}
	for _, l := range w.learner {
		s.Learners = append(s.Learners, l.Save())
	}
	if p.opts.VerifyCuts {
		sum := p.whole()
		s.Memory = &sum
	}
	w.logging.Store(true)
	pause := time.Since(began)
	w.tell(event{kind: evCall, call: func() {
		if p.gen.Load() == gen {
			p.cutTaken(a, s, buf, writes, pause)
		}
	}}, true)
	return nil
}

// cutTaken encodes what was taken and gives it to the node. The guest runs already.
func (p *Pair) cutTaken(a protocol.TakeCut, s cutState, buf *cutBuffer, writes []written, pause time.Duration) {
	size := 0
	for _, w := range writes {
		size += len(w.extent.Data)
	}
	if size > maxCutWrites {
		p.violation(p.conn, fmt.Errorf("a cut would carry %d bytes of disk writes", size))
		return
	}
	s.Writes = extents(writes)
	b, err := cbor.Marshal(s)
	if err != nil {
		p.fail(fmt.Errorf("pair: encode a cut: %w", err))
		return
	}
	data := append(binary.AppendUvarint(nil, uint64(len(b))), b...)
	set := &buf.set
	var sums []pages.Sum
	if a.Full {
		set = new(pages.Set)
		_ = p.all(func(i int, pfn uint64) error {
			set.Add(pfn)
			if page := buf.page(pfn); page != nil {
				p.sums[i] = pages.Hash(page)
			}
			return nil
		})
		sums, p.sums = p.sums, nil
	} else {
		for pfn := range set.All() {
			sums = append(sums, pages.Hash(buf.page(pfn)))
		}
	}
	data = pages.AppendHashes(data, set, sums)
	p.buffer = buf
	p.event("cut", map[string]any{"term": a.Term, "pages": buf.set.Len(), "full": a.Full, "writes": len(writes), "pause_us": pause.Microseconds()})
	p.node.CutTaken(data)
}

// extents encodes writes, in order.
func extents(writes []written) (chunks [][]byte) {
	w := pages.NewExtentWriter(pages.MaxChunk)
	for _, x := range writes {
		for e := x.extent; e.Length > 0; {
			piece := e
			if e.Data != nil {
				n := min(e.Length, pages.MaxExtent)
				piece.Length, piece.Data = n, e.Data[:n]
				e.Data = e.Data[n:]
			}
			e.Offset, e.Length = e.Offset+piece.Length, e.Length-piece.Length
			if !w.Add(piece) {
				chunks = append(chunks, w.AppendChunk(nil))
				w.Add(piece)
			}
		}
	}
	if w.Len() > 0 {
		chunks = append(chunks, w.AppendChunk(nil))
	}
	return chunks
}

// collect sends the pages that differ.
func (p *Pair) collect(want []byte) {
	buf := p.buffer
	p.beside(func(gen uint64) error {
		set, rest, err := pages.DecodeSet(want, int(p.pageFrames()))
		if err != nil || len(rest) != 0 {
			return fmt.Errorf("the set of pages that differ: %w", errors.Join(err, pages.ErrFormat))
		}
		if buf == nil {
			return errGone
		}
		// A page that nobody has written, as far as is known, and that differs all the same: it is as it was at the
		// cut if it was not written since.
		extra := map[uint64][]byte{}
		for pfn := range set.All() {
			if buf.page(pfn) == nil {
				extra[pfn] = nil
			}
		}
		if len(extra) > 0 {
			if err := p.loop(func() error { return p.collectNow(extra) }); err != nil {
				return err
			}
		}
		var w pages.PageWriter
		send := func(last bool) error {
			if err := p.room(gen); err != nil {
				return err
			}
			var b []byte
			if w.Len() > 0 {
				b = w.AppendChunk(nil)
			}
			p.post(func() {
				if p.gen.Load() == gen {
					p.node.CutPages(b, last)
				}
			})
			return nil
		}
		for pfn := range set.All() {
			page := buf.page(pfn)
			if page == nil {
				page = extra[pfn]
			}
			if !w.Add(pfn, page) {
				if err := send(false); err != nil {
					return err
				}
				w.Add(pfn, page)
			}
		}
		return send(true)
	})
}

// collectNow copies pages that have not been written since the cut. On the vCPU loop.
func (p *Pair) collectNow(extra map[uint64][]byte) error {
	if err := p.takeDirty(); err != nil {
		return err
	}
	for pfn := range extra {
		if !p.m.Memory().Contains(pfn*pages.Size, pages.Size) || p.dirty.Contains(pfn) {
			return fmt.Errorf("page %#x differs, and is no longer what it was at the cut", pfn)
		}
		extra[pfn] = append([]byte(nil), p.page(pfn)...)
	}
	return nil
}

// --- The backup's half --------------------------------------------------------------------------

// prepare makes this side ready to be overwritten.
func (p *Pair) prepare() {
	w := p.world
	frozen := w.is(live)
	forget := func() error {
		w.become(idle)
		w.in.Mute(true)
		w.logging.Store(false)
		w.disks.demote()
		w.newTerm()
		w.resetLog()
		w.exitSent = false
		clear(w.entropy)
		return nil
	}
	stood := make(chan struct{})
	if frozen {
		p.onLoop(func() error {
			err := forget()
			p.m.Thaw()
			close(stood)
			return err
		})
	} else {
		w.order(func() error { defer close(stood); return forget() })
	}
	p.beside(func(gen uint64) error {
		select {
		case <-stood:
		case <-p.ctx.Done():
			return errGone
		}
		w.disks.drain()
		w.disks.forget()
		if err := p.markStale(true); err != nil {
			return err
		}
		cleared := make(chan error, 1)
		w.order(func() error { cleared <- p.m.Memory().Clear(); return nil })
		select {
		case err := <-cleared:
			if err != nil {
				return err
			}
		case <-p.ctx.Done():
			return errGone
		}
		p.post(func() {
			if p.gen.Load() == gen {
				p.staging = true
				p.node.Prepared()
			}
		})
		return nil
	})
}

func (p *Pair) isStale() bool {
	if p.opts.StaleMark == "" {
		return false
	}
	_, err := os.Stat(p.opts.StaleMark)
	return !errors.Is(err, os.ErrNotExist)
}

// markStale notes, durably, whether this side's disks are a whole copy.
func (p *Pair) markStale(stale bool) error {
	path := p.opts.StaleMark
	if path == "" {
		return nil
	}
	if !stale {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("pair: %w", err)
		}
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("pair: %w", err)
	}
	_, err = f.WriteString("The disks of this side are being overwritten with the other side's, and are not a whole copy.\n")
	return errors.Join(err, f.Sync(), f.Close(), syncParent(path))
}

// stageChunk takes a piece of the pre-copy. It goes where it belongs: this side holds nothing.
func (p *Pair) stageChunk(b []byte) {
	p.beside(func(uint64) error {
		switch pages.KindOf(b) {
		case pages.Pages:
			return pages.DecodePages(b, p.pageFrames(), func(pfn uint64, page []byte) error {
				return p.m.Memory().Write(pfn*pages.Size, page)
			})
		case pages.Extents:
			return pages.DecodeExtents(b, p.world.disks.apply)
		}
		return fmt.Errorf("a chunk of no kind: %w", pages.ErrFormat)
	})
}

// stopForCut has replay stand, and this side's disks come to rest.
func (p *Pair) stopForCut() {
	w := p.world
	w.mu.Lock()
	w.stop = true
	w.mu.Unlock()
	stood := make(chan error, 1)
	w.order(func() error {
		stood <- p.takeDirty()
		return nil
	})
	p.beside(func(gen uint64) error {
		select {
		case err := <-stood:
			if err != nil {
				return err
			}
		case <-p.ctx.Done():
			return errGone
		}
		w.disks.drain()
		b := p.dirty.Append(nil) // the vCPU loop stands
		p.post(func() {
			if p.gen.Load() == gen {
				p.node.CutReady(b)
			}
		})
		return nil
	})
}

// stage takes the head of a cut and finds out which pages differ.
func (p *Pair) stage(data []byte) {
	came := time.Now()
	p.beside(func(gen uint64) error {
		n, k := binary.Uvarint(data)
		if k <= 0 || n > uint64(len(data)-k) {
			return fmt.Errorf("the head of a cut: %w", pages.ErrFormat)
		}
		var s cutState
		if err := cbor.Unmarshal(data[k:k+int(n)], &s); err != nil {
			return fmt.Errorf("the head of a cut: %w", err)
		}
		state, err := p.m.DecodeState(s.Machine)
		if err != nil {
			return err
		}
		if len(s.Learners) != len(p.world.learner) {
			return fmt.Errorf("a cut of a guest with %d network cards, this one has %d", len(s.Learners), len(p.world.learner))
		}
		set, sums, rest, err := pages.DecodeHashes(data[k+int(n):], int(p.pageFrames()))
		if err != nil || len(rest) != 0 {
			return fmt.Errorf("the hashes of a cut: %w", errors.Join(err, pages.ErrFormat))
		}
		var want pages.Set
		i := 0
		for pfn := range set.All() {
			page, err := p.m.Memory().View(pfn*pages.Size, pages.Size)
			if err != nil {
				return err
			}
			if pages.Hash(page) != sums[i] {
				want.Add(pfn)
			}
			i++
		}
		st := &staged{came: came, machine: state, memory: s.Memory, learners: s.Learners, writes: s.Writes, pages: make(map[uint64][]byte, want.Len())}
		p.post(func() {
			if p.gen.Load() == gen {
				p.staged = st
				p.node.CutWant(want.Append(nil))
			}
		})
		return nil
	})
}

// stagePages takes pages of a cut.
func (p *Pair) stagePages(b []byte) {
	if len(b) == 0 || p.staged == nil {
		return
	}
	err := pages.DecodePages(b, p.pageFrames(), func(pfn uint64, page []byte) error {
		if !p.m.Memory().Contains(pfn*pages.Size, pages.Size) {
			return fmt.Errorf("a cut has page %#x, this guest has not", pfn)
		}
		p.staged.pages[pfn] = append([]byte(nil), page...)
		return nil
	})
	if err != nil {
		p.violation(p.conn, err)
	}
}

// apply puts a cut in place. From here on it is not given up.
func (p *Pair) apply() {
	st, w := p.staged, p.world
	p.staged = nil
	if st == nil {
		p.fail(errors.New("pair: a cut is complete that was not begun"))
		return
	}
	p.work <- func() {
		for _, chunk := range st.writes {
			if err := pages.DecodeExtents(chunk, w.disks.apply); err != nil {
				p.fail(err)
				return
			}
		}
		w.order(func() error {
			joining := w.is(idle)
			w.disks.forget()
			w.newTerm()
			w.resetLog()
			clear(w.entropy)
			w.become(following)
			w.reissuing = true
			err := p.m.Replace(st.machine, func() error {
				if !joining {
					if err := p.untouched(st); err != nil {
						return err
					}
				}
				if !joining {
					p.logPages(st)
				}
				for pfn, page := range st.pages {
					if err := p.m.Memory().Write(pfn*pages.Size, page); err != nil {
						return err
					}
				}
				return nil
			})
			w.reissuing = false
			if err != nil {
				return err
			}
			if err := p.verify(st); err != nil {
				return err
			}
			w.exitSent = st.machine.Exit != nil
			for i, l := range st.learners {
				if err := w.learner[i].Restore(l); err != nil {
					return err
				}
			}
			// What was written up to here is the primary's.
			if err := p.m.TakeDirty(func(uint64) {}); err != nil {
				return err
			}
			p.dirty = pages.Set{}
			if err := p.markStale(false); err != nil {
				return err
			}
			w.mu.Lock()
			w.stop = false
			w.mu.Unlock()
			p.post(func() {
				p.exitHeld = st.machine.Exit != nil
				p.covered(st.came)
				p.node.CutApplied()
				p.decoder = log.Decoder{}
			})
			return nil
		})
	}
}

// logPages writes down where pages that a cut replaces differ: after a divergence that is where to look.
func (p *Pair) logPages(st *staged) {
	if !p.log.Enabled(p.ctx, slog.LevelDebug) {
		return
	}
	for pfn, page := range st.pages {
		mine, n := p.page(pfn), 0
		var first, last int
		for i := range page {
			if page[i] != mine[i] {
				if n == 0 {
					first = i
				}
				last = i
				n++
			}
		}
		p.log.Debug("page differs", "page", fmt.Sprintf("%#x", pfn*pages.Size), "bytes", n, "first", first, "last", last,
			"here", fmt.Sprintf("%x", mine[first:min(first+16, len(mine))]), "there", fmt.Sprintf("%x", page[first:min(first+16, len(page))]))
	}
}

// untouched makes sure that getting rid of an instruction that was half done has written nothing that the cut does not
// overwrite.
func (p *Pair) untouched(st *staged) error {
	var stray uint64
	found := false
	err := p.m.TakeDirty(func(pfn uint64) {
		if _, ok := st.pages[pfn]; !ok {
			stray, found = pfn, true
		}
	})
	if err == nil && found {
		err = fmt.Errorf("pair: page %#x was written while the guest stood", stray)
	}
	return err
}

// discard gives up a copy in either direction.
func (p *Pair) discard() {
	p.gen.Add(1)
	p.staged, p.buffer = nil, nil
	w := p.world
	w.disks.setTracking(trackNothing)
	p.work <- func() {
		// A cut that was being taken meanwhile has begun a term that nobody follows.
		w.disks.setTracking(trackNothing)
		w.logging.Store(false)
		p.sums = nil
	}
	w.mu.Lock()
	w.stop = false
	w.mu.Unlock()
	w.bell.Ring()
}

// feed gives the log to the guest that follows.
func (p *Pair) feed(a protocol.Feed) {
	var entries []log.Entry
	var marks []mark
	limit := false
	for _, i := range a.Items {
		if i.Mark {
			marks = append(marks, mark{i.Point, i.Digest})
			limit = true
			continue
		}
		p.decoder.Feed(i.Data)
		for p.decoder.More() {
			var e log.Entry
			if err := p.decoder.Next(&e); err != nil {
				p.violation(p.conn, err)
				return
			}
			if point(e.Pos) != i.Point || e.Kind != log.Sample && e.Kind != log.Input && e.Kind != log.Stop && e.Kind != log.Scrub || !p.possible(&e.Input, e.Kind) {
				p.violation(p.conn, fmt.Errorf("an entry of kind %d at %v in an item of %v", e.Kind, e.Pos, i.Point))
				return
			}
			if e.Kind == log.Input && e.Input.Kind == vmm.InputFrame {
				p.logged(&e.Input)
			}
			entries = append(entries, e)
		}
	}
	if err := p.world.feed(entries, marks, a.Limit, limit); err != nil {
		p.violation(p.conn, err)
	}
}

// possible says whether this machine can take an input.
func (p *Pair) possible(in *vmm.Input, kind log.Kind) bool {
	if kind != log.Input {
		return true
	}
	switch in.Kind {
	case vmm.InputDisk:
		return int(in.Device) < len(p.cfg.Disks)
	case vmm.InputFrame:
		return int(in.Device) < len(p.cfg.NICs) && len(in.Data) >= frameHeader && len(in.Data) <= net.MaxFrame
	case vmm.InputLink:
		return int(in.Device) < len(p.cfg.NICs)
	case vmm.InputConsole:
		n := len(p.cfg.Serial)
		if p.cfg.VirtioConsole != nil {
			n++
		}
		return int(in.Device) < n
	case vmm.InputEntropy:
		return p.cfg.RNG
	case vmm.InputStop:
		return false
	}
	return true
}

// --- Changing roles -----------------------------------------------------------------------------

// boot starts the guest from its disk. On the vCPU loop, which stands.
func (p *Pair) boot() error {
	if p.staging { // the memory is not as at power-on
		if err := p.m.PowerCycle(); err != nil {
			return err
		}
	}
	p.begun(false)
	return p.m.NewTerm()
}

// begun makes the world live.
func (p *Pair) begun(logging bool) {
	w := p.world
	w.in.Mute(false)
	w.become(live)
	w.in.SetTime(w.time)
	w.in.Resume()
	w.disks.promote()
	for d, o := range w.offloads {
		w.in.Offloads(d, o)
	}
	w.logging.Store(logging)
	w.bell.Ring()
}

// goLive switches from the log to the world. On the vCPU loop, which stands.
func (p *Pair) goLive(newTerm bool, term uint64, early []earlyFrame) error {
	w := p.world
	w.mu.Lock()
	w.queue, w.head, w.marks, w.diverged, w.stop = nil, 0, nil, false, false
	w.mu.Unlock()
	if newTerm {
		if err := p.m.NewTerm(); err != nil {
			return err
		}
		w.newTerm()
		w.disks.beginTerm(term)
	}
	p.begun(newTerm)
	w.inject(early)
	for tag, n := range w.entropy {
		w.in.Entropy(tag, n)
	}
	var frames [][][]byte
	for _, l := range w.learner {
		frames = append(frames, l.Frames())
	}
	w.tell(event{kind: evCall, call: func() { p.announce(frames, announce.Repeats) }}, true)
	return nil
}

// announce tells the networks where the guest is.
func (p *Pair) announce(frames [][][]byte, times int) {
	if !p.node.Live() {
		return
	}
	for nic, list := range frames {
		for _, f := range list {
			p.world.in.Frame(nic, append(make([]byte, frameHeader), f...))
		}
	}
	if times--; times > 0 {
		time.AfterFunc(announce.Interval, func() { p.post(func() { p.announce(frames, times) }) })
	}
}

// follow makes a frozen primary a backup in the state in which it stands. On the vCPU loop.
func (p *Pair) follow() error {
	w := p.world
	w.become(following)
	w.in.Mute(true)
	w.logging.Store(false)
	w.disks.demote()
	w.newTerm()
	if err := p.m.NewTerm(); err != nil {
		return err
	}
	p.m.Thaw()
	return nil
}
