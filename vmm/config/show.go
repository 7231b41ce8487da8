package config

import (
	"bytes"
	"fmt"
	"io"
	"reflect"

	"github.com/pelletier/go-toml/v2"
)

// Show writes the guest as TOML that can be read back: all settings, or only those that
// somebody set. With origin, a comment before each says where it comes from.
func (g *Guest) Show(w io.Writer, origins Origins, effective, origin bool) error {
	var out bytes.Buffer
	v := reflect.ValueOf(g).Elem()
	// Lists become tables, which TOML wants after everything else.
	for _, tables := range []bool{false, true} {
		for _, k := range keys {
			f, ok := fieldOf(v.Type(), k.Name)
			if !ok || k.List != tables || !effective && origins[k.Name] == OriginDefault {
				continue
			}
			value := v.FieldByIndex(f.Index)
			if k.List && value.Len() == 0 {
				// An empty list cannot be written as tables, and says what the absence of it says, but for one
				// that is not empty by default.
				if origin {
					fmt.Fprintf(&out, "\n# no %s: %s\n", k.Name, origins[k.Name])
				}
				continue
			}
			text, err := toml.Marshal(map[string]any{k.Name: value.Interface()})
			if err != nil {
				return fmt.Errorf("config: write %s: %w", k.Name, err)
			}
			if k.List {
				out.WriteByte('\n')
			}
			if origin {
				fmt.Fprintf(&out, "# %s\n", origins[k.Name])
			}
			out.Write(text)
		}
	}
	_, err := w.Write(out.Bytes())
	return err
}
