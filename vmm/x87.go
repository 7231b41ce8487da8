package vmm

import (
	"encoding/binary"
	"math"
	"math/big"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// This file carries out x87 instructions where KVM cannot (see emulate.go): loads of
// numbers and constants, stores of integers, the four operations, and the control word. Every
// memory tester and boot program that computes a frequency or a temperature needs these few.
//
// They are exact, with the rounding and the flags that the SDM prescribes, for zeros and
// normal numbers. What would raise another exception than inexactness, or inexactness while it is
// not masked, is not carried out, and the guest crashes as it would without this file. The pointers
// to the last instruction and operand stay as they are: only a handler of exceptions reads them.

// The FXSAVE area, which an XSAVE area begins with (SDM vol. 1, 10.5.1 and 13.4).
const (
	fxControl = 0
	fxStatus  = 2
	fxTags    = 4  // a bit for each physical register that is in use
	fxStack   = 32 // ST(0) to ST(7), 16 bytes each
	fxEntry   = 16
	xsaveBV   = 512 // which components are not in their initial state
	xsaveX87  = 1 << 0

	controlInitial  = 0x37f // everything masked, 64 bits of precision, round to nearest
	controlReserved = 0xe0c0
	controlFixed    = 0x40 // the reserved bit that is set
)

// The status and control words (SDM vol. 1, 8.1.3 and 8.1.5).
const (
	x87Exceptions = 0x3f   // flags in the status, masks in the control word
	x87Inexact    = 1 << 5 // the precision exception among them
	statusES      = 1 << 7 // an unmasked exception waits
	statusC1      = 1 << 9 // the last result was rounded up
	statusTop     = 11     // shift of the number of ST(0)'s register
	precisionPos  = 8
	roundingPos   = 10
)

// float80 is a double extended-precision number.
type float80 struct {
	mantissa uint64 // with its integer bit
	sign     bool
	exponent uint16 // biased
}

const (
	bias80      = 16383
	exponentMax = 0x7fff // of infinities and NaNs
)

// x87 is the unit's state.
type x87 struct {
	control, status uint16
	used            uint8 // physical registers, a bit each
	regs            [8]float80
}

// loadX87 reads the state from an XSAVE area.
func loadX87(area []byte) x87 {
	le := binary.LittleEndian
	if le.Uint64(area[xsaveBV:])&xsaveX87 == 0 {
		return x87{control: controlInitial}
	}
	f := x87{control: le.Uint16(area[fxControl:]), status: le.Uint16(area[fxStatus:]), used: area[fxTags]}
	for i := range f.regs {
		p := area[fxStack+i*fxEntry:]
		e := le.Uint16(p[8:])
		f.regs[f.index(i)] = float80{mantissa: le.Uint64(p), exponent: e & exponentMax, sign: e > exponentMax}
	}
	return f
}

// store writes the state to an XSAVE area.
func (f *x87) store(area []byte) {
	le := binary.LittleEndian
	if bv := le.Uint64(area[xsaveBV:]); bv&xsaveX87 == 0 {
		le.PutUint64(area[xsaveBV:], bv|xsaveX87)
		clear(area[:24]) // all before MXCSR
	}
	le.PutUint16(area[fxControl:], f.control)
	le.PutUint16(area[fxStatus:], f.status)
	area[fxTags] = f.used
	for i := range f.regs {
		r := f.regs[f.index(i)]
		p := area[fxStack+i*fxEntry:]
		le.PutUint64(p, r.mantissa)
		e := r.exponent
		if r.sign {
			e |= 1 << 15
		}
		le.PutUint16(p[8:], e)
	}
}

// index is the physical register of ST(i).
func (f *x87) index(i int) int { return (int(f.status>>statusTop) + i) & 7 }

func (f *x87) setTop(top int) {
	f.status = f.status&^(7<<statusTop) | uint16(top&7)<<statusTop
}

// st returns ST(i), unless it is empty.
func (f *x87) st(i int) (float80, bool) {
	n := f.index(i)
	return f.regs[n], f.used>>n&1 != 0
}

func (f *x87) set(i int, v float80) {
	n := f.index(i)
	f.regs[n] = v
	f.used |= 1 << n
}

// push pushes a number, unless the stack is full.
func (f *x87) push(v float80) bool {
	if _, full := f.st(-1); full {
		return false
	}
	f.setTop(f.index(-1))
	f.set(0, v)
	f.status &^= statusC1
	return true
}

func (f *x87) pop() {
	n := f.index(0)
	f.used &^= 1 << n
	f.setTop(n + 1)
}

// rounding returns the rounding mode.
func (f *x87) rounding() big.RoundingMode {
	return [...]big.RoundingMode{big.ToNearestEven, big.ToNegativeInf, big.ToPositiveInf, big.ToZero}[f.control>>roundingPos&3]
}

// rounded records how a result was rounded; false if that raises an exception.
func (f *x87) rounded(acc big.Accuracy, negative bool) bool {
	f.status &^= statusC1
	if acc == big.Exact {
		return true
	}
	if f.control&x87Inexact == 0 {
		return false
	}
	f.status |= x87Inexact
	if (acc == big.Above) != negative {
		f.status |= statusC1
	}
	return true
}

// big returns the number, unless it is an infinity, a NaN, or denormal.
func (v float80) big() (*big.Float, bool) {
	z := new(big.Float).SetPrec(64)
	switch {
	case v.exponent == 0 && v.mantissa == 0:
	case v.exponent == 0 || v.exponent == exponentMax || v.mantissa>>63 == 0:
		return nil, false
	default:
		z.SetUint64(v.mantissa)
		z.SetMantExp(z, int(v.exponent)-bias80-63)
	}
	if v.sign {
		z.Neg(z)
	}
	return z, true
}

// fromBig returns a number of up to 64 bits, unless its exponent is out of range.
func fromBig(x *big.Float) (float80, bool) {
	v := float80{sign: x.Signbit()}
	if x.Sign() == 0 {
		return v, true
	}
	if x.IsInf() {
		return v, false
	}
	mantissa := new(big.Float)
	e := x.MantExp(mantissa) - 1 + bias80
	if e < 1 || e >= exponentMax {
		return v, false
	}
	v.exponent = uint16(e)
	v.mantissa, _ = mantissa.SetMantExp(mantissa.Abs(mantissa), 64).Uint64()
	return v, true
}

// arithmetic carries out a op b, with the operation as the instructions encode it.
func (f *x87) arithmetic(op byte, a, b float80) (float80, bool) {
	precision := [...]uint{24, 0, 53, 64}[f.control>>precisionPos&3]
	x, ok1 := a.big()
	y, ok2 := b.big()
	if !ok1 || !ok2 || precision == 0 {
		return a, false
	}
	if x.Sign() == 0 && y.Sign() == 0 && f.rounding() == big.ToNegativeInf {
		return a, false // the sign of the zero is not what package big makes it
	}
	z := new(big.Float).SetPrec(precision).SetMode(f.rounding())
	switch op {
	case 0:
		z.Add(x, y)
	case 1:
		z.Mul(x, y)
	case 4:
		z.Sub(x, y)
	case 5:
		z.Sub(y, x)
	case 6, 7:
		if op == 7 {
			x, y = y, x
		}
		if y.Sign() == 0 {
			return a, false
		}
		z.Quo(x, y)
	default: // comparisons
		return a, false
	}
	v, ok := fromBig(z)
	return v, ok && f.rounded(z.Acc(), v.sign)
}

// integer rounds a number to an integer of some bytes.
func (f *x87) integer(v float80, size int) (uint64, bool) {
	x, ok := v.big()
	if !ok || v.exponent > bias80+63 {
		return 0, false
	}
	// Below 2^64 in magnitude: adding nothing at a precision that ends at the point rounds it.
	z := new(big.Float).SetMode(f.rounding())
	if bits := x.MantExp(nil); bits > 0 {
		z.SetPrec(uint(bits)).Set(x)
	} else if x.Sign() != 0 {
		// Between -1 and 1: what is added and taken away again leaves one bit before the point.
		two := big.NewFloat(2)
		if v.sign {
			two.Neg(two)
		}
		z.SetPrec(2).Add(two, x)
		acc := z.Acc()
		n, _ := z.Int64()
		if !f.rounded(acc, v.sign) {
			return 0, false
		}
		if v.sign {
			return uint64(n + 2), true
		}
		return uint64(n - 2), true
	}
	n, exact := z.Int64()
	limit := int64(1) << (8*size - 1)
	if exact != big.Exact || size < 8 && (n < -limit || n >= limit) {
		return 0, false
	}
	return uint64(n), f.rounded(z.Acc(), v.sign)
}

// The constants that instructions load.
var (
	zero80 = float80{}
	one80  = float80{mantissa: 1 << 63, exponent: bias80}
)

// The kinds of operands in memory.
type operandKind uint8

const (
	single operandKind = iota + 1
	double
	integer
	controlWord
)

// memoryOperand tells an instruction's operand in memory and its size, 0 if the
// instruction is not carried out here, and whether it is stored.
func memoryOperand(op, reg byte) (kind operandKind, size int, store bool) {
	switch op {
	case 0xd8:
		return single, 4, false
	case 0xda:
		return integer, 4, false
	case 0xdc:
		return double, 8, false
	case 0xde:
		return integer, 2, false
	}
	switch uint16(op)<<4 | uint16(reg) {
	case 0xd90: // FLD
		return single, 4, false
	case 0xdd0:
		return double, 8, false
	case 0xd95: // FLDCW
		return controlWord, 2, false
	case 0xd97: // FNSTCW
		return controlWord, 2, true
	case 0xdb0, 0xdb2, 0xdb3: // FILD, FIST, FISTP
		return integer, 4, reg != 0
	case 0xdf0, 0xdf2, 0xdf3:
		return integer, 2, reg != 0
	case 0xdf5, 0xdf7:
		return integer, 8, reg == 7
	}
	return 0, 0, false
}

// number converts an operand in memory.
func number(kind operandKind, p []byte) (float80, bool) {
	le := binary.LittleEndian
	var x float64
	switch {
	case kind == single:
		x = float64(math.Float32frombits(le.Uint32(p)))
		if a := math.Abs(x); a != 0 && a < 0x1p-126 {
			return zero80, false // denormal
		}
	case kind == double:
		x = math.Float64frombits(le.Uint64(p))
		if a := math.Abs(x); a != 0 && a < 0x1p-1022 {
			return zero80, false
		}
	case len(p) == 2:
		x = float64(int16(le.Uint16(p)))
	case len(p) == 4:
		x = float64(int32(le.Uint32(p)))
	default:
		return fromBig(new(big.Float).SetInt64(int64(le.Uint64(p))))
	}
	if math.IsNaN(x) {
		return zero80, false
	}
	return fromBig(big.NewFloat(x))
}

// memory carries out an instruction with an operand in memory, which p holds or takes.
func (f *x87) memory(op, reg byte, kind operandKind, store bool, p []byte) bool {
	le := binary.LittleEndian
	switch {
	case kind == controlWord && store:
		le.PutUint16(p, f.control)
		return true
	case kind == controlWord:
		f.control = le.Uint16(p)&^controlReserved | controlFixed
		return f.status&x87Exceptions&^f.control == 0 // else an exception is unmasked that waits
	case store:
		v, ok := f.st(0)
		if !ok {
			return false
		}
		n, ok := f.integer(v, len(p))
		if !ok {
			return false
		}
		var b [8]byte
		le.PutUint64(b[:], n)
		copy(p, b[:])
		if reg != 2 {
			f.pop()
		}
		return true
	}
	v, ok := number(kind, p)
	if !ok {
		return false
	}
	if op&1 != 0 {
		return f.push(v)
	}
	a, ok := f.st(0)
	if !ok {
		return false
	}
	if v, ok = f.arithmetic(reg, a, v); ok {
		f.set(0, v)
	}
	return ok
}

// register carries out an instruction without an operand in memory.
func (f *x87) register(op, modrm byte) bool {
	i, reg := int(modrm&7), modrm>>3&7
	a, ok1 := f.st(0)
	b, ok2 := f.st(i)
	switch {
	case op == 0xd9 && modrm == 0xee: // FLDZ
		return f.push(zero80)
	case op == 0xd9 && modrm == 0xe8: // FLD1
		return f.push(one80)
	case op == 0xdd && reg == 3 && ok1: // FSTP ST(i), whose destination may be empty
		f.set(i, a)
		f.pop()
		f.status &^= statusC1
		return true
	case !ok1 || !ok2:
		return false
	case op == 0xd9 && reg == 0: // FLD ST(i)
		return f.push(b)
	case op == 0xd9 && reg == 1: // FXCH
		f.set(0, b)
		f.set(i, a)
		f.status &^= statusC1
		return true
	case op == 0xd8, op == 0xdc, op == 0xde:
		v, ok := f.arithmetic(reg, a, b)
		if !ok {
			return false
		}
		if op == 0xd8 {
			i = 0
		}
		f.set(i, v)
		if op == 0xde {
			f.pop()
		}
		return true
	}
	return false
}

// Bits of the control registers that matter here (SDM vol. 3, 2.5).
const (
	cr0MP   = 1 << 1
	cr0EM   = 1 << 2
	cr0TS   = 1 << 3
	cr4LA57 = 1 << 12
	cr4SMAP = 1 << 21
)

// emulateX87 carries out an x87 instruction and returns its length, 0 if it does not know
// it or the instruction does not go the plain way. The registers but RIP are then changed, or not at all.
func (m *Machine) emulateX87(insn []byte, regs *kvm.Regs) (int, error) {
	sregs, err := m.vcpu.Sregs()
	if err != nil {
		return 0, err
	}
	area, err := m.vcpu.XSave()
	if err != nil {
		return 0, err
	}
	f := loadX87(area)
	if insn[0] == opFWAIT {
		if sregs.CR0&(cr0MP|cr0TS) == cr0MP|cr0TS || f.status&statusES != 0 {
			return 0, nil
		}
		return 1, nil
	}
	if sregs.CR0&cr0PE == 0 || regs.RFLAGS&rflagsVM != 0 || sregs.CS.Selector&3 != 0 {
		return 0, nil
	}
	long := sregs.EFER&eferLMA != 0 && sregs.CS.L != 0
	var rex byte
	at := 0
	if long && insn[0]&0xf0 == 0x40 {
		rex, at = insn[0], 1
	}
	if len(insn) < at+2 || insn[at]&0xf8 != 0xd8 || sregs.CR0&(cr0EM|cr0TS) != 0 {
		return 0, nil
	}
	op, modrm := insn[at], insn[at+1]
	reg := modrm >> 3 & 7
	if f.status&statusES != 0 && !(op == 0xd9 && reg == 7 && modrm < 0xc0) { // FNSTCW does not wait
		return 0, nil
	}
	if modrm >= 0xc0 {
		if !f.register(op, modrm) {
			return 0, nil
		}
		f.store(area)
		return at + 2, m.vcpu.SetXSave(area)
	}
	kind, size, store := memoryOperand(op, reg)
	offset, stack, n := effectiveAddress(insn[at+1:], rex, long, regs)
	if size == 0 || n == 0 {
		return 0, nil
	}
	length := at + 1 + n
	switch {
	case long && modrm&0xc7 == 0x05:
		offset += regs.RIP + uint64(length) // relative to the next instruction
	case !long:
		if sregs.CS.DB == 0 {
			return 0, nil
		}
		seg := &sregs.DS
		if stack {
			seg = &sregs.SS
		}
		// A data segment that expands up, writable if it has to be.
		if seg.Unusable != 0 || seg.Present == 0 || seg.Typ&(typeCode|typeExpandDown) != 0 ||
			store && seg.Typ&2 == 0 || offset+uint64(size)-1 > uint64(seg.Limit) {
			return 0, nil
		}
		offset = uint64(uint32(offset + seg.Base))
	}
	var buf [8]byte
	p := buf[:size]
	spans, ok := m.linear(&sregs, regs.RFLAGS, offset, p, store)
	if !ok {
		return 0, nil
	}
	for _, s := range spans {
		if !m.mem.Contains(s.gpa, uint64(len(s.p))) {
			return 0, nil
		}
		if store {
			continue
		}
		if err := m.mem.Read(s.gpa, s.p); err != nil {
			return 0, err
		}
	}
	if !f.memory(op, reg, kind, store, p) {
		return 0, nil
	}
	if store {
		for _, s := range spans {
			if err := m.mem.Write(s.gpa, s.p); err != nil {
				return 0, err
			}
		}
	}
	f.store(area)
	return length, m.vcpu.SetXSave(area)
}

// effectiveAddress decodes ModRM, SIB and displacement of an operand in memory, with
// addresses of 32 or 64 bits (SDM vol. 2, 2.1.5). It returns the offset, whether the stack
// segment is meant, and how many bytes that took, 0 if some are missing.
func effectiveAddress(insn []byte, rex byte, long bool, r *kvm.Regs) (offset uint64, stack bool, n int) {
	gpr := [16]uint64{r.RAX, r.RCX, r.RDX, r.RBX, r.RSP, r.RBP, r.RSI, r.RDI, r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15}
	mod, rm := insn[0]>>6, insn[0]&7
	n = 1
	base := rm | rex&1<<3
	noBase := mod == 0 && rm == 5
	if rm == 4 {
		if len(insn) < 2 {
			return 0, false, 0
		}
		sib := insn[1]
		n = 2
		base = sib&7 | rex&1<<3
		noBase = mod == 0 && sib&7 == 5
		if index := sib>>3&7 | rex&2<<2; index != 4 {
			offset = gpr[index] << (sib >> 6)
		}
	}
	if !noBase {
		offset += gpr[base]
		stack = base == 4 || base == 5
	}
	switch {
	case mod == 1:
		if len(insn) < n+1 {
			return 0, false, 0
		}
		offset += uint64(int8(insn[n]))
		n++
	case mod == 2 || noBase:
		if len(insn) < n+4 {
			return 0, false, 0
		}
		offset += uint64(int32(binary.LittleEndian.Uint32(insn[n:])))
		n += 4
	}
	if !long {
		offset = uint64(uint32(offset))
	}
	return offset, stack, n
}

// span is a part of an operand that lies in one page.
type span struct {
	gpa uint64
	p   []byte
}

// linear translates the addresses of an operand; false if one cannot be accessed, or
// has a paging mode that is not known here.
func (m *Machine) linear(s *kvm.Sregs, rflags, addr uint64, p []byte, write bool) ([]span, bool) {
	const page = 1 << 12
	var spans []span
	for len(p) > 0 {
		n := min(len(p), int(page-addr%page))
		gpa := addr
		if s.CR0&cr0PG != 0 {
			var ok bool
			if gpa, ok = m.walk(s, rflags, addr, write); !ok {
				return nil, false
			}
		}
		if !m.mem.Contains(gpa, uint64(n)) {
			return nil, false
		}
		spans = append(spans, span{gpa, p[:n]})
		addr, p = addr+uint64(n), p[n:]
	}
	return spans, true
}

// Bits of a page table's entry (SDM vol. 3, 4.5).
const (
	pteP    = 1 << 0
	pteW    = 1 << 1
	pteU    = 1 << 2
	pteA    = 1 << 5
	pteD    = 1 << 6
	ptePS   = 1 << 7
	pteAddr = 0x000f_ffff_ffff_f000
)

// walk translates an address by 4-level paging and sets the accessed and dirty bits.
func (m *Machine) walk(s *kvm.Sregs, rflags, addr uint64, write bool) (uint64, bool) {
	const rflagsAC = 1 << 18
	if s.EFER&eferLMA == 0 || s.CR4&cr4LA57 != 0 || uint64(int64(addr<<16)>>16) != addr {
		return 0, false
	}
	table, user := s.CR3&pteAddr, true
	for shift := 39; ; shift -= 9 {
		at := table + addr>>shift&0x1ff*8
		e, err := m.mem.Uint64(at)
		if err != nil || e&pteP == 0 || write && e&pteW == 0 {
			return 0, false
		}
		user = user && e&pteU != 0
		leaf := shift == 12 || e&ptePS != 0 && shift < 39
		set := e | pteA
		if leaf {
			if user && s.CR4&cr4SMAP != 0 && rflags&rflagsAC == 0 {
				return 0, false
			}
			if write {
				set |= pteD
			}
		}
		if set != e {
			if err := m.mem.PutUint64(at, set); err != nil {
				return 0, false
			}
		}
		if leaf {
			low := uint64(1)<<shift - 1
			return e&pteAddr&^low | addr&low, true
		}
		table = e & pteAddr
	}
}
