package config

import (
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Size is a number of bytes. Users write "256M"; the suffixes K, M, G and T are powers of 1024, in
// either case, and "KiB" and so on mean the same. A plain number is bytes.
type Size uint64

// The units.
const (
	KiB Size = 1 << 10
	MiB Size = 1 << 20
	GiB Size = 1 << 30
	TiB Size = 1 << 40
)

var units = []struct {
	suffix string
	size   Size
}{{"T", TiB}, {"G", GiB}, {"M", MiB}, {"K", KiB}}

// ParseSize parses the user's notation.
func ParseSize(s string) (Size, error) {
	number, unit := strings.ToUpper(s), Size(1)
	number = strings.TrimSuffix(number, "IB")
	for _, u := range units {
		if rest, ok := strings.CutSuffix(number, u.suffix); ok {
			number, unit = rest, u.size
			break
		}
	}
	if unit == 1 && len(number) != len(s) {
		return 0, fmt.Errorf("%q is no size: a number with K, M, G or T is", s)
	}
	// ParseUint takes signs and underscores in no form, which is what we want here too.
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is no size: a number with K, M, G or T is", s)
	}
	hi, lo := bits.Mul64(n, uint64(unit))
	if hi != 0 || lo > math.MaxInt64 {
		return 0, fmt.Errorf("%q is more bytes than can be addressed", s)
	}
	return Size(lo), nil
}

// String returns the shortest exact notation.
func (s Size) String() string {
	for _, u := range units {
		if s != 0 && s%u.size == 0 {
			return strconv.FormatUint(uint64(s/u.size), 10) + u.suffix
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) error {
	v, err := ParseSize(string(b))
	if err == nil {
		*s = v
	}
	return err
}

// MarshalJSON writes a number of bytes, as all of ftvmm's JSON does.
func (s Size) MarshalJSON() ([]byte, error) { return strconv.AppendUint(nil, uint64(s), 10), nil }

// UnmarshalJSON reads a number of bytes or the user's notation.
func (s *Size) UnmarshalJSON(b []byte) error {
	text := string(b)
	if len(b) > 0 && b[0] == '"' {
		if err := json.Unmarshal(b, &text); err != nil {
			return err
		}
	}
	return s.UnmarshalText([]byte(text))
}
