package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// MaxFile bounds a configuration file in bytes.
const MaxFile = 1 << 20

// Origin says where a setting's value comes from: "default", "file guest.toml", "env
// FTVMM_MEMORY", "flag --memory".
type Origin string

// OriginDefault is the origin of what nobody set.
const OriginDefault Origin = "default"

// Origins holds the origin of every setting, by its name.
type Origins map[string]Origin

// Sources are the places that settings come from.
type Sources struct {
	File string // path of a TOML or JSON (".json") file; empty for none
	// LookupEnv reads the environment, as os.LookupEnv does; nil for no environment.
	LookupEnv func(string) (string, bool)
	// Flags are the values of the flags that were given, by the setting's name.
	Flags map[string][]string
}

// Load merges all sources over the defaults. It reports every error of the first source that
// has one, as [Errors]. It does not check the result: see [Guest.Check].
func Load(src Sources) (*Guest, Origins, error) {
	g, origins := Default(), Origins{}
	for _, k := range keys {
		origins[k.Name] = OriginDefault
	}
	if src.File != "" {
		present, err := loadFile(g, src.File)
		if err != nil {
			return nil, nil, err
		}
		for _, name := range present {
			origins[name] = Origin("file " + src.File)
		}
	}
	var errs Errors
	if src.LookupEnv != nil {
		for _, k := range keys {
			v, ok := src.LookupEnv(k.Env())
			if !ok || v == "" {
				continue // an empty variable is as good as none
			}
			values := []string{v}
			if k.List {
				values = strings.Split(v, ";")
			}
			errs = apply(g, k, values, Origin("env "+k.Env()), origins, errs)
		}
	}
	for _, k := range keys {
		if values, ok := src.Flags[k.Name]; ok && len(values) > 0 {
			errs = apply(g, k, values, Origin("flag --"+k.Flag()), origins, errs)
		}
	}
	if len(errs) > 0 {
		return nil, nil, errs
	}
	g.fill()
	return g, origins, nil
}

func apply(g *Guest, k Key, values []string, from Origin, origins Origins, errs Errors) Errors {
	if err := k.set(g, values); err != nil {
		return append(errs, &Error{Code: BadValue, Where: string(from), Message: err.Error(), Remedy: "see ftvmm run --help: " + plain(k.Doc)})
	}
	origins[k.Name] = from
	return errs
}

// plain removes the marks of the value's name.
func plain(doc string) string { return strings.ReplaceAll(doc, "`", "") }

// loadFile reads path into g and returns the settings that it has. Relative paths in it are relative to the
// file's directory.
func loadFile(g *Guest, path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, Errors{{Code: FileUnreadable, Where: path, Message: cause(err), Remedy: "name a configuration file that exists and can be read"}}
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, Errors{{Code: FileUnreadable, Where: path, Message: cause(err), Remedy: "name a configuration file that can be read"}}
	}
	present, err := Parse(g, data, path)
	if err != nil {
		return nil, err
	}
	g.resolve(filepath.Dir(path), present)
	return present, nil
}

// Parse reads the text of a configuration file into g, over what is there, and returns the names of
// the settings that it has. name is the file's, for messages; one that ends in ".json" is JSON, else it is TOML.
func Parse(g *Guest, data []byte, name string) (present []string, err error) {
	if len(data) > MaxFile {
		return nil, Errors{{Code: FileUnreadable, Where: name, Message: fmt.Sprintf("the file is longer than %d bytes", MaxFile), Remedy: "is it a configuration file?"}}
	}
	// Lists of the file replace those that are there; a decoder would write into the old entries.
	parsed := *g
	parsed.Disks, parsed.NICs, parsed.Serials = nil, nil, nil
	if strings.HasSuffix(name, ".json") {
		present, err = parseJSON(&parsed, data, name)
	} else {
		present, err = parseTOML(&parsed, data, name)
	}
	if err != nil {
		return nil, err
	}
	if !slices.Contains(present, "disk") {
		parsed.Disks = g.Disks
	}
	if !slices.Contains(present, "nic") {
		parsed.NICs = g.NICs
	}
	if !slices.Contains(present, "serial") {
		parsed.Serials = g.Serials
	}
	*g = parsed
	return present, nil
}

func parseTOML(g *Guest, data []byte, name string) ([]string, error) {
	dec := toml.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(g)
	var missing *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case errors.As(err, &missing):
		var errs Errors
		for i := range missing.Errors {
			e := &missing.Errors[i]
			line, _ := e.Position()
			errs = append(errs, unknownKey(fmt.Sprintf("%s:%d", name, line), e.Key()))
		}
		return nil, errs
	case errors.As(err, &bad):
		line, column := bad.Position()
		if key := bad.Key(); len(key) > 0 {
			return nil, Errors{{Code: BadValue, Where: fmt.Sprintf("%s:%d", name, line), Key: strings.Join(key, "."),
				Message: friendly(bad.Error()), Remedy: "see ftvmm run --help for what " + key[0] + " can be"}}
		}
		return nil, Errors{{Code: BadSyntax, Where: fmt.Sprintf("%s:%d:%d", name, line, column),
			Message: friendly(bad.Error()), Remedy: "correct the TOML at this place"}}
	case err != nil:
		return nil, Errors{{Code: BadValue, Where: name, Message: friendly(err.Error()), Remedy: "correct the value"}}
	}
	var top map[string]any
	if err := toml.Unmarshal(data, &top); err != nil {
		return nil, Errors{{Code: BadSyntax, Where: name, Message: friendly(err.Error()), Remedy: "correct the TOML"}}
	}
	var present []string
	for _, k := range keys {
		if _, ok := top[k.Name]; ok {
			present = append(present, k.Name)
			delete(top, k.Name)
		}
	}
	// The decoder takes keys in any case, we take them as they are documented.
	var errs Errors
	for key := range top {
		errs = append(errs, unknownKey(name, []string{key}))
	}
	if len(errs) > 0 {
		slices.SortFunc(errs, func(a, b *Error) int { return strings.Compare(a.Key, b.Key) })
		return nil, errs
	}
	return present, nil
}

// friendly takes the names of Go types out of a decoder's message.
func friendly(msg string) string {
	for _, expr := range []string{
		`cannot decode TOML (\S+) into (?:a )?(?:struct field \S+ of type )?(\S+)`,
		`cannot unmarshal (\S+) into Go (?:struct field \S+|value) of type (\S+)`,
	} {
		// Compiled here, not at the start of every command: it is seldom needed.
		if m := regexp.MustCompile(expr).FindStringSubmatch(msg); m != nil {
			return fmt.Sprintf("a %s stands where %s belongs", m[1], goType(m[2]))
		}
	}
	return strings.TrimPrefix(strings.TrimPrefix(msg, "toml: "), "json: ")
}

func goType(t string) string {
	switch {
	case strings.HasPrefix(t, "[]string"):
		return "a list of texts"
	case strings.HasPrefix(t, "[]"):
		return "a list of tables"
	case t == "string", strings.HasSuffix(t, ".Spec"):
		return "a text"
	case t == "bool":
		return "true or false"
	case strings.HasSuffix(t, "int"), strings.HasSuffix(t, "uint64"):
		return "a whole number"
	case strings.HasSuffix(t, ".Size"):
		return "a size"
	}
	return "a table"
}

// unknownKey is the refusal of a key; the nearest is looked for among its neighbours.
func unknownKey(where string, key []string) *Error {
	// Point at the first part that is unknown: of "dsk.path" that is "dsk".
	for i := range key {
		known := keysBelow(strings.Join(key[:i], "."))
		if slices.Contains(known, key[i]) {
			continue
		}
		e := &Error{Code: UnknownKey, Where: where, Key: strings.Join(key[:i+1], "."), Message: "there is no such setting"}
		if near := Nearest(key[i], known); near != "" {
			e.Remedy = fmt.Sprintf("did you mean %q?", near)
		} else if known == nil {
			e.Remedy = fmt.Sprintf("%s has no settings below it", strings.Join(key[:i], "."))
		} else {
			e.Remedy = "there are " + strings.Join(known, ", ")
		}
		return e
	}
	return &Error{Code: UnknownKey, Where: where, Key: strings.Join(key, "."), Message: "there is no such setting at this place",
		Remedy: "see ftvmm run --help for the settings"}
}

// parseJSON is strict as TOML is: unknown and repeated keys are errors, and names are exact.
func parseJSON(g *Guest, data []byte, name string) ([]string, error) {
	w := jsonWalk{data: data, name: name, dec: json.NewDecoder(bytes.NewReader(data))}
	if err := w.document(); err != nil {
		return nil, Errors{{Code: BadSyntax, Where: w.where(), Message: friendly(err.Error()), Remedy: "correct the JSON at this place"}}
	}
	if len(w.errs) > 0 {
		return nil, w.errs
	}
	if err := json.Unmarshal(data, g); err != nil {
		e := &Error{Code: BadValue, Where: name, Message: friendly(err.Error()), Remedy: "see ftvmm run --help for what the settings can be"}
		var typeErr *json.UnmarshalTypeError
		if errors.As(err, &typeErr) {
			e.Key = typeErr.Field
			e.Where = fmt.Sprintf("%s:%d", name, lineAt(data, typeErr.Offset))
		}
		return nil, Errors{e}
	}
	return w.present, nil
}

// jsonWalk finds the keys of a JSON document that are not settings.
type jsonWalk struct {
	data    []byte
	name    string
	dec     *json.Decoder
	present []string
	errs    Errors
}

// maxJSONDepth bounds nesting; a configuration has three levels.
const maxJSONDepth = 8

func (w *jsonWalk) where() string {
	return fmt.Sprintf("%s:%d", w.name, lineAt(w.data, w.dec.InputOffset()))
}

func lineAt(data []byte, offset int64) int {
	return 1 + bytes.Count(data[:min(max(offset, 0), int64(len(data)))], []byte("\n"))
}

func (w *jsonWalk) document() error {
	tok, err := w.dec.Token()
	if err != nil {
		return err
	}
	if tok != json.Delim('{') {
		return errors.New("the document is no object")
	}
	if err := w.object(nil, 0); err != nil {
		return err
	}
	if _, err := w.dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the document")
	}
	return nil
}

func (w *jsonWalk) object(path []string, depth int) error {
	if depth > maxJSONDepth {
		return errors.New("objects are nested too deeply")
	}
	known := keysBelow(strings.Join(path, "."))
	seen := map[string]bool{}
	for w.dec.More() {
		tok, err := w.dec.Token()
		if err != nil {
			return err
		}
		key := tok.(string) // the decoder lets nothing else stand here
		below := append(slices.Clip(path), key)
		switch {
		case seen[key]:
			w.errs = append(w.errs, &Error{Code: BadSyntax, Where: w.where(), Key: strings.Join(below, "."), Message: "the key stands here twice", Remedy: "remove one"})
		case !slices.Contains(known, key):
			w.errs = append(w.errs, unknownKey(w.where(), below))
		case depth == 0:
			w.present = append(w.present, key)
		}
		seen[key] = true
		if err := w.value(below, depth); err != nil {
			return err
		}
	}
	_, err := w.dec.Token()
	return err
}

func (w *jsonWalk) value(path []string, depth int) error {
	tok, err := w.dec.Token()
	if err != nil {
		return err
	}
	switch tok {
	case json.Delim('{'):
		return w.object(path, depth+1)
	case json.Delim('['):
		if depth > maxJSONDepth {
			return errors.New("lists are nested too deeply")
		}
		for w.dec.More() {
			if err := w.value(path, depth+1); err != nil {
				return err
			}
		}
		_, err := w.dec.Token()
		return err
	}
	return nil
}

// resolve makes the relative paths that a file set relative to the file.
func (g *Guest) resolve(dir string, present []string) {
	rel := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	for _, key := range present {
		switch key {
		case "kernel":
			rel(&g.Kernel)
		case "initrd":
			rel(&g.Initrd)
		case "control":
			rel(&g.Control)
		case "events":
			if !strings.HasPrefix(g.Events, "fd:") {
				rel(&g.Events)
			}
		case "console":
			rel(&g.Console.Path)
		case "debugcon":
			rel(&g.DebugCon.Path)
		case "firmware":
			if !isWord(g.Firmware) {
				rel(&g.Firmware)
			}
		case "disk":
			for i := range g.Disks {
				rel(&g.Disks[i].Path)
			}
		case "nic":
			for i := range g.NICs {
				if g.NICs[i].ROM != ROMNone {
					rel(&g.NICs[i].ROM)
				}
				rel(&g.NICs[i].TFTP)
			}
		case "serial":
			for i := range g.Serials {
				rel(&g.Serials[i].Backend.Path)
			}
		}
	}
}

// isWord tells whether a firmware setting is a word, not a path.
func isWord(firmware string) bool {
	return firmware == FirmwareAuto || firmware == FirmwareSeaBIOS || firmware == FirmwareNone
}

// cause returns the text of an error of the file system without the path, which the message has already.
func cause(err error) string {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}
