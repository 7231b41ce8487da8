package vmm

import (
	"context"
	"encoding/binary"
	"math"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

func le64(x float64) []byte {
	return binary.LittleEndian.AppendUint64(nil, math.Float64bits(x))
}

// middling draws numbers whose sums, products and quotients are normal.
func middling() *rapid.Generator[float64] {
	return rapid.Custom(func(t *rapid.T) float64 {
		x := math.Ldexp(1+rapid.Float64Range(0, 0.9999999).Draw(t, "mantissa"), rapid.IntRange(-200, 200).Draw(t, "exponent"))
		if rapid.Bool().Draw(t, "negative") {
			x = -x
		}
		return x
	})
}

// At 53 bits of precision the unit computes what Go's float64 does.
func TestX87ComputesLikeFloat64(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := middling().Draw(t, "a"), middling().Draw(t, "b")
		if rapid.Bool().Draw(t, "near") {
			b = math.Nextafter(-a, b)
		}
		for op, want := range map[byte]float64{0: a + b, 1: a * b, 4: a - b, 5: b - a, 6: a / b, 7: b / a} {
			f := x87{control: controlInitial&^(3<<precisionPos) | 2<<precisionPos}
			require.True(t, f.memory(0xdd, 0, double, false, le64(a)))
			require.True(t, f.memory(0xdc, op, double, false, le64(b)))
			got, _ := f.st(0)
			w, ok := number(double, le64(want))
			require.True(t, ok)
			require.Equal(t, w, got, "%v and %v by operation %d", a, b, op)

			// The same between registers, with a pop.
			f = x87{control: f.control}
			require.True(t, f.memory(0xdd, 0, double, false, le64(b)))
			require.True(t, f.memory(0xdd, 0, double, false, le64(a)))
			require.True(t, f.register(0xde, 0xc1|op<<3))
			got, _ = f.st(0)
			require.Equal(t, w, got)
			_, full := f.st(1)
			require.False(t, full)
		}
	})
}

func TestX87RoundsToIntegers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := rapid.OneOf(rapid.Float64Range(-3, 3), rapid.Float64Range(-0x1p31, 0x1p31),
			rapid.Map(rapid.IntRange(-9, 9), func(n int) float64 { return float64(n) / 2 })).Draw(t, "x")
		if x != 0 && math.Abs(x) < 0x1p-1000 {
			x = 0 // not a denormal
		}
		for mode, round := range []func(float64) float64{math.RoundToEven, math.Floor, math.Ceil, math.Trunc} {
			want := round(x)
			if want < math.MinInt32 || want > math.MaxInt32 {
				continue
			}
			f := x87{control: controlInitial | uint16(mode)<<roundingPos}
			require.True(t, f.memory(0xdd, 0, double, false, le64(x)))
			p := make([]byte, 4)
			require.True(t, f.memory(0xdb, 3, integer, true, p))
			require.Equal(t, int32(want), int32(binary.LittleEndian.Uint32(p)), "%v, mode %d", x, mode)
			require.Equal(t, want != x, f.status&x87Inexact != 0)
			require.Equal(t, math.Abs(want) > math.Abs(x), f.status&statusC1 != 0, "%v, mode %d", x, mode)
			require.Zero(t, f.used)
		}
	})
}

func TestX87RefusesWhatRaisesExceptions(t *testing.T) {
	for name, do := range map[string]func(f *x87) bool{
		"empty stack":    func(f *x87) bool { return f.register(0xde, 0xc1) },
		"store nothing":  func(f *x87) bool { return f.memory(0xdb, 3, integer, true, make([]byte, 4)) },
		"infinity":       func(f *x87) bool { return f.memory(0xdd, 0, double, false, le64(math.Inf(1))) },
		"NaN":            func(f *x87) bool { return f.memory(0xdd, 0, double, false, le64(math.NaN())) },
		"denormal":       func(f *x87) bool { return f.memory(0xdd, 0, double, false, le64(1e-310)) },
		"compare":        func(f *x87) bool { return f.push(one80) && f.memory(0xdc, 2, double, false, le64(1)) },
		"divide by zero": func(f *x87) bool { return f.push(one80) && f.memory(0xdc, 6, double, false, le64(0)) },
		"too large": func(f *x87) bool {
			return f.memory(0xdd, 0, double, false, le64(0x1p31)) && f.memory(0xdb, 3, integer, true, make([]byte, 4))
		},
		"far too large": func(f *x87) bool {
			return f.memory(0xdd, 0, double, false, le64(0x1p200)) && f.memory(0xdf, 7, integer, true, make([]byte, 8))
		},
		"unmasks pending": func(f *x87) bool { f.status |= 4; return f.memory(0xd9, 5, controlWord, false, []byte{0x70, 3}) },
		"unmasked inexact": func(f *x87) bool {
			f.control &^= x87Inexact
			return f.push(one80) && f.memory(0xdc, 6, double, false, le64(3))
		},
		"full stack": func(f *x87) bool {
			for range 8 {
				if !f.push(one80) {
					return true // too early
				}
			}
			return f.push(one80)
		},
	} {
		f := x87{control: controlInitial}
		require.False(t, do(&f), name)
	}
}

func TestX87StateSurvivesTheXSaveArea(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		area := make([]byte, 576)
		f := loadX87(area)
		require.Equal(t, x87{control: controlInitial}, f, "an area that says that the unit is in its initial state")
		for range rapid.IntRange(0, 8).Draw(t, "pushes") {
			require.True(t, f.memory(0xdd, 0, double, false, le64(middling().Draw(t, "x"))))
		}
		f.store(area)
		require.Equal(t, f, loadX87(area))
	})
}

// No instruction bytes make the decoder reach outside of them.
func FuzzEffectiveAddress(f *testing.F) {
	f.Add([]byte{0x44, 0x24, 0x08}, byte(0), true)
	f.Add([]byte{0x05, 1, 2, 3, 4}, byte(0x41), false)
	f.Add([]byte{0x84}, byte(0x4f), true)
	f.Fuzz(func(t *testing.T, insn []byte, rex byte, long bool) {
		if len(insn) == 0 {
			return
		}
		offset, _, n := effectiveAddress(insn, rex, long, &kvm.Regs{RSP: 1 << 40})
		require.LessOrEqual(t, n, len(insn))
		require.True(t, long || offset < 1<<32)
	})
}

// x87Guest computes 0.125*1000 + 0 as memtest86+ computes a temperature, truncated, and
// exits with it and with 1 more if the control word could not be restored.
var x87Guest = []byte{
	0xbc, 0x00, 0x00, 0x08, 0x00, // mov esp, 0x80000
	0xdb, 0xe3, // fninit
	0xc7, 0x04, 0x24, 0x00, 0x00, 0x00, 0x3e, // mov dword [esp], 0.125 (single)
	0xc7, 0x44, 0x24, 0x08, 0xef, 0x03, 0x00, 0x00, // mov dword [esp+8], 1007
	0xd9, 0xee, // fldz
	0xd9, 0x7c, 0x24, 0x0e, // fnstcw [esp+14]
	0xd9, 0x04, 0x24, // fld dword [esp]
	0xde, 0x4c, 0x24, 0x08, // fimul word [esp+8]
	0x66, 0x8b, 0x44, 0x24, 0x0e, // mov ax, [esp+14]
	0x80, 0xcc, 0x0c, // or ah, 12: truncate
	0x66, 0x89, 0x44, 0x24, 0x0c, // mov [esp+12], ax
	0xde, 0xc1, // faddp st1, st0
	0xd9, 0x6c, 0x24, 0x0c, // fldcw [esp+12]
	0xdb, 0x5c, 0x24, 0x08, // fistp dword [esp+8]
	0x9b,                   // fwait
	0xd9, 0x6c, 0x24, 0x0e, // fldcw [esp+14]
	0xd9, 0x7c, 0x24, 0x10, // fnstcw [esp+16]
	0x8b, 0x44, 0x24, 0x08, // mov eax, [esp+8]
	0x66, 0x81, 0x7c, 0x24, 0x10, 0x7f, 0x03, // cmp word [esp+16], 0x37f
	0x74, 0x01, // je +1
	0x40,       // inc eax
	0xe6, 0xf4, // out 0xf4, al
	0xf4, // hlt
}

// The guest finds the same where the processor runs it and where this package does.
func TestX87Guest(t *testing.T) {
	m, err := New(Config{Memory: testMemory, Kernel: x87Guest, KernelKind: boot.Flat})
	require.NoError(t, err)
	defer m.Close()
	e, err := m.Run(context.Background())
	require.NoError(t, err)
	require.Equal(t, Exit{Reason: ExitDebugExit, Code: 125}, e)
	t.Logf("%d instructions were carried out here", m.stats.Emulated)
}
