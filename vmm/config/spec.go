package config

import (
	"errors"
	"fmt"
	"reflect"
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

// assign sets the fields of the struct at v, by their keys in files, as items say.
func assign(v reflect.Value, items []item) error {
	seen := map[string]bool{}
	for _, it := range items {
		f, ok := fieldOf(v.Type(), it.key)
		if !ok {
			known := keysOf(v.Type())
			if near := Nearest(it.key, known); near != "" {
				return fmt.Errorf("there is no %q here; did you mean %q?", it.key, near)
			}
			return fmt.Errorf("there is no %q here; there are %s", it.key, strings.Join(known, ", "))
		}
		field := v.FieldByIndex(f.Index)
		if seen[it.key] && field.Kind() != reflect.Slice {
			return fmt.Errorf("%s is given twice", it.key)
		}
		seen[it.key] = true
		if err := assignField(field, it); err != nil {
			return fmt.Errorf("%s: %w", it.key, err)
		}
	}
	return nil
}

func assignField(field reflect.Value, it item) error {
	switch p := field.Addr().Interface().(type) {
	case *bool:
		return it.boolean(p)
	case **bool:
		*p = new(bool)
		return it.boolean(*p)
	}
	if it.bare || it.value == "" {
		return fmt.Errorf("a value is missing, as in %s=…", it.key)
	}
	var err error
	switch p := field.Addr().Interface().(type) {
	case *string:
		*p = it.value
	case *[]string:
		*p = append(*p, it.value)
	case *int:
		*p, err = parseInt(it.value)
	case *Size:
		*p, err = ParseSize(it.value)
	default:
		err = fmt.Errorf("cannot be written here")
	}
	return err
}

func (it item) boolean(p *bool) (err error) {
	if *p = true; !it.bare {
		*p, err = parseBool(it.value)
	}
	return err
}

// ParseDisk parses the description of a disk: "path=root.img,readonly,id=root"; the path's key
// may be left out if it comes first, and a bare "direct" is direct=on.
func ParseDisk(spec string) (Disk, error) {
	var d Disk
	items, err := splitSpec(spec)
	if err != nil {
		return d, err
	}
	for i := range items {
		it := &items[i]
		if _, isKey := fieldOf(reflect.TypeFor[Disk](), it.key); it.bare && i == 0 && !isKey {
			*it = item{key: "path", value: it.key}
		} else if it.bare && it.key == "direct" {
			*it = item{key: "direct", value: DirectOn}
		}
	}
	return d, assign(reflect.ValueOf(&d).Elem(), items)
}

// cardKeys are the keys of a NIC that belong to the card, not to its network.
var cardKeys = []string{"rom", "model", "legacy", "bootindex", "kind"}

// ParseNIC parses the description of a network card: its network first, then settings of the network and
// of the card in any order: "user,hostfwd=tcp:127.0.0.1:8080-:80,mac=52:54:00:12:34:56" or "tap=tap0,bridge=br0".
func ParseNIC(spec string) (NIC, error) {
	var n NIC
	items, err := splitSpec(spec)
	if err != nil {
		return n, err
	}
	switch first := &items[0]; {
	case first.bare:
		*first = item{key: "kind", value: first.key}
	case first.key == "tap":
		n.Kind = "tap"
	default:
		return n, fmt.Errorf("the network comes first, as in user,%s", first)
	}
	return n, assign(reflect.ValueOf(&n).Elem(), items)
}

// Spec returns the network's settings in the notation of package mirror/nic.
func (n NIC) Spec() string {
	first := n.Kind
	if n.Tap != "" && (n.Kind == "tap" || n.Kind == "") {
		first = "tap=" + n.Tap
		n.Tap = ""
	}
	parts := []string{first}
	add := func(key, value string) { parts = append(parts, key+"="+value) }
	v := reflect.ValueOf(n)
	for i := range v.NumField() {
		key := fileKey(v.Type().Field(i))
		if slices.Contains(cardKeys, key) || v.Field(i).IsZero() {
			continue
		}
		switch value := v.Field(i).Interface().(type) {
		case []string:
			for _, s := range value {
				add(key, s)
			}
		case *bool:
			add(key, strconv.FormatBool(*value))
		default:
			add(key, fmt.Sprint(value))
		}
	}
	for i, p := range parts {
		parts[i] = strings.ReplaceAll(p, ",", ",,")
	}
	return strings.Join(parts, ",")
}

// ParseSerial parses the description of a serial port.
func ParseSerial(spec string) (Serial, error) {
	s, err := console.ParseSpec(spec)
	return Serial{Backend: s}, err
}
