package sim

import "github.com/ftvmm/ftvmm/lockstep/protocol"

// The guest is a small deterministic machine: what it does next is a function of its state and
// its inputs, and all of its state soon shows in its digest. It keeps a ledger: a client's
// number is written to disk, and acknowledged when the write has completed.

const (
	clients  = 4
	slots    = 8 // of the disk: one for each client, the rest for scratch writes
	pages    = 8
	words    = 4
	requests = 6 // in flight at once
)

type page [words]uint64

// request is a disk write. id 0: free.
type request struct {
	id   uint64
	slot int
	val  uint64
}

type guest struct {
	boot     uint64 // which power-on this is: the record's epoch then
	exits    uint64
	mem      [pages]page
	ledger   [clients]uint64
	inflight [requests]request
	nextReq  uint64
	outSeq   uint64
	halted   bool
	digest   uint64
	dirty    uint8 // pages written since the last cut
}

type inputKind uint8

const (
	inFrame inputKind = iota
	inDone
	inTime
)

// input is one input: a client's frame, a completion, a sample of time.
type input struct {
	kind   inputKind
	client int
	val    uint64 // the client's number, the request, the time
}

// output is what the guest sends.
type output struct {
	boot, seq uint64
	hash      uint64 // of the guest's history: two versions of one output differ in it
	client    int    // -1: no acknowledgement
	val       uint64
}

// effects is what one stop of the guest did to the outside.
type effects struct {
	outputs []output
	writes  []request
	tainted bool
}

func mix(h uint64, vs ...uint64) uint64 {
	for _, v := range vs {
		h ^= v + 0x9e3779b97f4a7c15 + h<<6 + h>>2
		h ^= h >> 30
		h *= 0xbf58476d1ce4e5b9
		h ^= h >> 27
	}
	return h
}

// newGuest is a guest that boots from a disk.
func newGuest(boot uint64, disk *[slots]uint64) guest {
	g := guest{boot: boot, digest: mix(1, boot), nextReq: 1}
	copy(g.ledger[:], disk[:clients])
	for i, v := range disk {
		g.mem[i%pages][0] = mix(v, boot)
	}
	return g
}

func (g *guest) sum() protocol.Digest {
	var d protocol.Digest
	for i := range 8 {
		d[i] = byte(g.digest >> (8 * i))
	}
	return d
}

// hash is a hash of all state that counts.
func (g *guest) hash() uint64 {
	h := mix(4, g.boot, g.exits, g.digest, g.outSeq, g.nextReq)
	for i := range g.mem {
		h = mix(h, g.mem[i][:]...)
	}
	h = mix(h, g.ledger[:]...)
	for _, r := range g.inflight {
		h = mix(h, r.id, r.val)
	}
	return h
}

func (g *guest) set(p, w uint64, v uint64) {
	g.mem[p%pages][w%words] = v
	g.dirty |= 1 << (p % pages)
}

func (g *guest) busy(slot int) bool {
	for _, r := range g.inflight {
		if r.id != 0 && r.slot == slot {
			return true
		}
	}
	return false
}

func (g *guest) emit(e *effects, client int, val uint64) {
	e.outputs = append(e.outputs, output{g.boot, g.outSeq, mix(g.digest, g.outSeq), client, val})
	g.digest = mix(g.digest, g.outSeq, uint64(client), val)
	g.outSeq++
}

// write starts a write, if a request is free and the slot has none: overlapping requests are
// serialised.
func (g *guest) write(e *effects, slot int, val uint64) {
	if g.busy(slot) {
		return
	}
	for i := range g.inflight {
		if g.inflight[i].id == 0 {
			r := request{g.nextReq, slot, val}
			g.nextReq++
			g.inflight[i] = r
			e.writes = append(e.writes, r)
			g.digest = mix(g.digest, r.id, uint64(slot), val)
			return
		}
	}
}

// stop runs the guest to its next stop, after it has got its inputs. tsc is what its RDTSC would
// read; it executes one only if the machine has such instructions.
func (g *guest) stop(in []input, tsc uint64, hasTSC bool) effects {
	var e effects
	if g.halted {
		if len(in) == 0 {
			return e
		}
		g.halted = false
	}
	for _, i := range in {
		switch i.kind {
		case inTime:
			g.set(7, i.val, mix(g.mem[7][0], i.val))
		case inFrame:
			if i.val <= g.ledger[i.client] {
				g.emit(&e, i.client, g.ledger[i.client])
			} else {
				g.write(&e, i.client, i.val)
			}
		case inDone:
			for k, r := range g.inflight {
				if r.id != i.val {
					continue
				}
				g.inflight[k] = request{}
				if r.slot < clients {
					g.ledger[r.slot] = r.val
					g.emit(&e, r.slot, r.val)
				}
			}
		}
	}
	g.exits++
	// Half of memory steers the guest; the rest shows up when the scrub comes by.
	h := mix(g.digest, g.exits, g.mem[g.exits%(pages/2)][g.exits%words])
	g.set(h, h>>8, mix(h, g.mem[h%pages][0]))
	if hasTSC && (h>>40)%64 == 0 {
		e.tainted = true
		g.set(6, 0, mix(g.mem[6][0], tsc))
	}
	if g.exits%8 == 0 {
		p := g.mem[g.exits/8%pages]
		h = mix(h, p[:]...)
		l := g.ledger
		h = mix(h, l[:]...)
	}
	g.digest = mix(g.digest, h)
	if (h>>20)%16 == 0 {
		g.emit(&e, -1, h)
	}
	if (h>>24)%32 == 0 {
		g.write(&e, clients+int(h>>50)%(slots-clients), h)
	}
	g.halted = (h>>32)%16 == 0
	g.digest = mix(g.digest, uint64(len(e.outputs)))
	return e
}
