package nic

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// MAC is an Ethernet address. The zero value means that none was given.
type MAC [6]byte

// Bits of the first byte of an Ethernet address (IEEE 802, 8.2).
const (
	groupBit = 0x01
	localBit = 0x02
)

// defaultPrefix is that of the addresses that VMMs based on KVM give out: locally
// administered, unicast.
var defaultPrefix = [3]byte{0x52, 0x54, 0x00}

// DefaultMAC returns the address of the network card with the given index, from 0 on, of
// the guest of the given name: the same on every host and after every start. Cards of
// one guest never share an address; two guests do with a probability of 1 in 2^24.
func DefaultMAC(guest string, index int) MAC {
	sum := sha256.Sum256([]byte("ftvmm MAC\x00" + guest))
	low := uint32(sum[0])<<16 | uint32(sum[1])<<8 | uint32(sum[2])
	low += uint32(index)
	return MAC{defaultPrefix[0], defaultPrefix[1], defaultPrefix[2], byte(low >> 16), byte(low >> 8), byte(low)}
}

// ParseMAC reads six bytes in hexadecimal, separated by colons or by hyphens; it must be
// the address of one station.
func ParseMAC(text string) (MAC, error) {
	var m MAC
	sep := ":"
	if strings.Contains(text, "-") {
		sep = "-"
	}
	parts := strings.Split(text, sep)
	if len(parts) != len(m) {
		return MAC{}, fmt.Errorf("%q is not a MAC address such as 52:54:00:12:34:56", text)
	}
	for i, p := range parts {
		b, err := hex.DecodeString(p)
		if err != nil || len(b) != 1 {
			return MAC{}, fmt.Errorf("%q is not a MAC address such as 52:54:00:12:34:56", text)
		}
		m[i] = b[0]
	}
	return m, m.validate()
}

func (m MAC) validate() error {
	switch {
	case m == MAC{}:
		return fmt.Errorf("the MAC address %s is no station's", m)
	case m[0]&groupBit != 0:
		return fmt.Errorf("the MAC address %s is a group's: its first byte must be even (%02x, for example)", m, m[0]&^groupBit|localBit)
	}
	return nil
}

// String writes lower case and colons.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// MarshalText writes what String does.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what [ParseMAC] does.
func (m *MAC) UnmarshalText(text []byte) (err error) {
	*m, err = ParseMAC(string(text))
	return err
}
