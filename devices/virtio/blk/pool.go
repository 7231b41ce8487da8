package blk

import "math/bits"

const (
	minBuffer     = 4 << 10
	bufferClasses = 11 // 4 KiB to MaxTransfer
	// maxPooled bounds the buffers kept for the next request, in bytes.
	maxPooled = 16 << 20
)

// pool keeps buffers between requests, in classes of powers of two. (A sync.Pool
// would do, but depends on when garbage is collected.)
type pool struct {
	free  [bufferClasses][][]byte
	bytes int
}

// class returns the class of buffers that hold n bytes, 1 to MaxTransfer.
func class(n uint64) int { return bits.Len64((n - 1) / minBuffer) }

// get returns a buffer of at least n bytes, whose content is anything.
func (p *pool) get(n uint64) []byte {
	c := class(n)
	if k := len(p.free[c]); k > 0 {
		b := p.free[c][k-1]
		p.free[c] = p.free[c][:k-1]
		p.bytes -= len(b)
		return b
	}
	return make([]byte, minBuffer<<c)
}

// put takes a buffer back.
func (p *pool) put(b []byte) {
	if p.bytes+len(b) > maxPooled {
		return
	}
	c := class(uint64(len(b)))
	p.free[c] = append(p.free[c], b)
	p.bytes += len(b)
}
