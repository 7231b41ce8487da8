package config

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/ftvmm/ftvmm/vmm/console"
)

// The flags --disk, --nic and --serial describe a device in one word: items separated by
// commas, each "key=value" or a bare "key" for what is true or on. A comma that belongs to a
// value is written twice.

// maxSpec bounds such a word in bytes.
const maxSpec = 16 << 10

// item is one part of a spec.
type item struct {
	key, value string
	bare       bool // there was no "="
}

func (it item) String() string {
	if it.bare {
		return it.key
	}
	return it.key + "=" + it.value
}

// splitSpec takes a spec apart.
func splitSpec(spec string) ([]item, error) {
	if len(spec) > maxSpec {
		return nil, fmt.Errorf("the description is longer than %d bytes", maxSpec)
	}
	var items []item
	var part strings.Builder
	for i := 0; i <= len(spec); i++ {
		if i < len(spec) && spec[i] != ',' {
			part.WriteByte(spec[i])
			continue
		}
		if i+1 < len(spec) && spec[i+1] == ',' {
			part.WriteByte(',')
			i++
			continue
		}
		if part.Len() == 0 {
			return nil, errors.New("there is an empty item between two commas or at an end")
		}
		key, value, hasValue := strings.Cut(part.String(), "=")
		items = append(items, item{key, value, !hasValue})
		part.Reset()
	}
	return items, nil
}

// joinSpec is the inverse of splitSpec.
func joinSpec(items []string) string {
	quoted := make([]string, len(items))
	for i, it := range items {
		quoted[i] = strings.ReplaceAll(it, ",", ",,")
	}
	return strings.Join(quoted, ",")
}

func (it item) boolean() (bool, error) {
	if it.bare {
		return true, nil
	}
	v, err := parseBool(it.value)
	if err != nil {
		return false, fmt.Errorf("%s: %w", it.key, err)
	}
	return v, nil
}

func (it item) number() (int, error) {
	v, err := parseInt(it.value)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", it.key, err)
	}
	return v, nil
}

func (it item) text() (string, error) {
	if it.bare || it.value == "" {
		return "", fmt.Errorf("%s: a value is missing, as in %s=…", it.key, it.key)
	}
	return it.value, nil
}

func parseBool(s string) (bool, error) {
	switch s {
	case "true", "on", "yes", "1":
		return true, nil
	case "false", "off", "no", "0":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither true nor false", s)
}

func parseInt(s string) (int, error) {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q is no whole number", s)
	}
	return int(n), nil
}

var diskKeys = []string{"path", "size", "readonly", "direct", "model", "legacy", "queue_size", "queues", "id", "bootindex"}

// ParseDisk parses the description of a disk: "path=root.img,readonly,id=root"; the path's key
// may be left out if it comes first.
func ParseDisk(spec string) (Disk, error) {
	var d Disk
	items, err := splitSpec(spec)
	if err != nil {
		return d, err
	}
	if first := &items[0]; first.bare && !slices.Contains(diskKeys, first.key) {
		*first = item{key: "path", value: first.key}
	}
	seen := map[string]bool{}
	for _, it := range items {
		if seen[it.key] {
			return d, fmt.Errorf("%s is given twice", it.key)
		}
		seen[it.key] = true
		switch it.key {
		case "path":
			d.Path, err = it.text()
		case "size":
			d.Size, err = ParseSize(it.value)
		case "readonly":
			d.ReadOnly, err = it.boolean()
		case "direct":
			if d.Direct = it.value; it.bare {
				d.Direct = DirectOn
			}
		case "model":
			d.Model, err = it.text()
		case "legacy":
			d.Legacy, err = it.boolean()
		case "queue_size":
			d.QueueSize, err = it.number()
		case "queues":
			d.Queues, err = it.number()
		case "id":
			d.ID, err = it.text()
		case "bootindex":
			d.BootIndex, err = it.index()
		default:
			err = unknownItem(it.key, diskKeys)
		}
		if err != nil {
			return d, err
		}
	}
	return d, nil
}

func (it item) index() (*int, error) {
	n, err := it.number()
	if err != nil {
		return nil, err
	}
	return &n, nil
}

func unknownItem(key string, known []string) error {
	if near := Nearest(key, known); near != "" {
		return fmt.Errorf("there is no %q here; did you mean %q?", key, near)
	}
	return fmt.Errorf("there is no %q here; there are %s", key, strings.Join(known, ", "))
}

var nicKeys = []string{"mac", "rom", "model", "legacy", "queue_size", "id", "bootindex"}

// ParseNIC parses the description of a network card: the backend first, then the card's settings and the
// backend's options in any order: "user,hostfwd=tcp:127.0.0.1:8080-:80,mac=52:54:00:12:34:56".
func ParseNIC(spec string) (NIC, error) {
	var n NIC
	items, err := splitSpec(spec)
	if err != nil {
		return n, err
	}
	if slices.Contains(nicKeys, items[0].key) {
		return n, fmt.Errorf("the backend comes first, as in user,%s", items[0])
	}
	n.Backend = items[0].String()
	seen := map[string]bool{}
	for _, it := range items[1:] {
		if slices.Contains(nicKeys, it.key) {
			if seen[it.key] {
				return n, fmt.Errorf("%s is given twice", it.key)
			}
			seen[it.key] = true
		}
		switch it.key {
		case "mac":
			n.MAC, err = it.text()
		case "rom":
			n.ROM, err = it.text()
		case "model":
			n.Model, err = it.text()
		case "legacy":
			n.Legacy, err = it.boolean()
		case "queue_size":
			n.QueueSize, err = it.number()
		case "id":
			n.ID, err = it.text()
		case "bootindex":
			n.BootIndex, err = it.index()
		default:
			n.Options = append(n.Options, it.String())
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// Kind returns the backend's kind: "user", "tap".
func (n NIC) Kind() string {
	kind, _, _ := strings.Cut(n.Backend, "=")
	return kind
}

// BackendSpec returns backend and options in the notation of --nic.
func (n NIC) BackendSpec() string {
	return joinSpec(append([]string{n.Backend}, n.Options...))
}

// ParseSerial parses the description of a serial port.
func ParseSerial(spec string) (Serial, error) {
	s, err := console.ParseSpec(spec)
	return Serial{Backend: s}, err
}
