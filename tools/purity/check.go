package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// forbiddenImports are packages that bring time, chance, concurrency or the outside in. A path
// that ends in "/" stands for all below it.
var forbiddenImports = []string{
	"crypto/rand", "math/rand", "math/rand/", "net", "net/", "os", "os/", "io/ioutil", "log", "log/", "runtime", "runtime/",
	"sync", "sync/", "syscall", "unsafe", "plugin", "C", "context", "testing", "testing/", "golang.org/x/sys/",
}

// purePackages are the parts of this module, below its path, that pure code may import.
var purePackages = []string{"devices", "devices/", "firmware", "firmware/", "vmm/memory"}

// clocks are the functions of package time that read a clock or wait.
var clocks = []string{"Now", "Since", "Until", "After", "AfterFunc", "NewTimer", "NewTicker", "Tick", "Sleep"}

// mapOrder are the functions of package maps whose results come in random order.
var mapOrder = []string{"All", "Keys", "Values"}

// exceptions allow an import in a file, by its path in the module, with the reason.
var exceptions = map[string]map[string]string{
	"firmware/image.go":       {"os": "reads firmware images from the host's disk, before there is a guest"},
	"devices/virtio/queue.go": {"sync/atomic": "a memory barrier against other vCPUs, whose value nobody reads"},
}

// Finding is one violation.
type Finding struct {
	Pos  token.Position
	Text string
}

// String returns the form that editors understand.
func (f Finding) String() string { return fmt.Sprintf("%s: %s", f.Pos, f.Text) }

// listed is what "go list -json" tells of a package.
type listed struct {
	ImportPath string
	Dir        string
	Export     string // the compiler's export data
	GoFiles    []string
	DepOnly    bool
	ImportMap  map[string]string
	Module     *struct{ Path, Dir string }
	Error      *struct{ Err string }
}

// Check checks the packages that match the patterns, in the module at dir.
func Check(dir string, patterns ...string) ([]Finding, error) {
	packages, err := list(dir, patterns)
	if err != nil {
		return nil, err
	}
	exports := map[string]string{}
	for _, p := range packages {
		exports[p.ImportPath] = p.Export
	}
	var findings []Finding
	for _, p := range packages {
		// A package called …test helps tests, as net/http/httptest does.
		if p.DepOnly || strings.HasSuffix(p.ImportPath, "test") {
			continue
		}
		f, err := checkPackage(p, exports)
		if err != nil {
			return nil, err
		}
		findings = append(findings, f...)
	}
	sort.SliceStable(findings, func(i, j int) bool {
		a, b := findings[i].Pos, findings[j].Pos
		if a.Filename != b.Filename {
			return a.Filename < b.Filename
		}
		return a.Offset < b.Offset
	})
	return findings, nil
}

// list has the go command find the packages and compile what they import.
func list(dir string, patterns []string) ([]*listed, error) {
	cmd := exec.Command("go", append([]string{"list", "-deps", "-export", "-json=ImportPath,Dir,Export,GoFiles,DepOnly,ImportMap,Module,Error"}, patterns...)...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w\n%s", err, stderr.Bytes())
	}
	var packages []*listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		p := &listed{}
		if err := dec.Decode(p); errors.Is(err, io.EOF) {
			return packages, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		if p.Error != nil {
			return nil, fmt.Errorf("go list: %s: %s", p.ImportPath, p.Error.Err)
		}
		packages = append(packages, p)
	}
}

// checkPackage type-checks one package and looks at its syntax.
func checkPackage(p *listed, exports map[string]string) ([]Finding, error) {
	c := &checker{pkg: p, fset: token.NewFileSet(), info: &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}}
	var files []*ast.File
	for _, name := range p.GoFiles {
		f, err := parser.ParseFile(c.fset, filepath.Join(p.Dir, name), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	lookup := func(path string) (io.ReadCloser, error) {
		if mapped, ok := p.ImportMap[path]; ok {
			path = mapped
		}
		file, ok := exports[path]
		if !ok || file == "" {
			return nil, fmt.Errorf("no export data for %s", path)
		}
		return os.Open(file)
	}
	conf := types.Config{Importer: importer.ForCompiler(c.fset, "gc", lookup)}
	if _, err := conf.Check(p.ImportPath, c.fset, files, c.info); err != nil {
		return nil, fmt.Errorf("type-check %s: %w", p.ImportPath, err)
	}
	for _, f := range files {
		c.file(f)
	}
	return c.findings, nil
}

type checker struct {
	pkg      *listed
	fset     *token.FileSet
	info     *types.Info
	ordered  map[int]bool // lines that excuse a loop over a map
	findings []Finding
}

func (c *checker) report(n ast.Node, format string, args ...any) {
	c.findings = append(c.findings, Finding{c.fset.Position(n.Pos()), fmt.Sprintf(format, args...)})
}

// mark excuses a loop over a map; a reason has to follow it.
const mark = "//purity:ordered "

func (c *checker) file(f *ast.File) {
	c.ordered = map[int]bool{}
	for _, group := range f.Comments {
		for _, comment := range group.List {
			if reason, ok := strings.CutPrefix(comment.Text, mark); ok && strings.TrimSpace(reason) != "" {
				line := c.fset.Position(comment.Pos()).Line
				c.ordered[line], c.ordered[line+1] = true, true
			}
		}
	}
	for _, imp := range f.Imports {
		c.importSpec(imp)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		c.node(n)
		return true
	})
}

func matches(path string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		return path == p || strings.HasSuffix(p, "/") && strings.HasPrefix(path, p)
	})
}

func (c *checker) importSpec(imp *ast.ImportSpec) {
	path, err := strconv.Unquote(imp.Path.Value)
	if err != nil {
		return // the parser has accepted it
	}
	if m := c.pkg.Module; m != nil {
		if rel, err := filepath.Rel(m.Dir, c.fset.Position(imp.Pos()).Filename); err == nil && exceptions[filepath.ToSlash(rel)][path] != "" {
			return
		}
		if below, ok := strings.CutPrefix(path, m.Path+"/"); ok && !matches(below, purePackages) {
			c.report(imp, "import of %s, which is not pure", path)
		}
	}
	if matches(path, forbiddenImports) {
		c.report(imp, "import of %s in deterministic code", path)
	}
}

func (c *checker) node(n ast.Node) {
	switch n := n.(type) {
	case *ast.GoStmt:
		c.report(n, "go statement in deterministic code")
	case *ast.SelectStmt:
		c.report(n, "select in deterministic code")
	case *ast.SendStmt:
		c.report(n, "channel send in deterministic code")
	case *ast.UnaryExpr:
		if n.Op == token.ARROW {
			c.report(n, "channel receive in deterministic code")
		}
	case *ast.RangeStmt:
		c.loop(n)
	case *ast.SelectorExpr:
		c.selector(n)
	case *ast.BasicLit:
		c.float(n)
	case *ast.Ident:
		// Names of variables and fields; their types tell of every other way to a floating-point value.
		if obj := c.info.Uses[n]; obj != nil {
			if _, isType := obj.(*types.TypeName); isType && isFloat(obj.Type()) {
				c.report(n, "floating point in deterministic code")
			}
		}
	}
}

// float reports a literal that becomes a floating-point value; 1e9 as an integer is fine.
func (c *checker) float(n *ast.BasicLit) {
	tv, ok := c.info.Types[n]
	if ok && isFloat(tv.Type) && tv.Type.(*types.Basic).Info()&types.IsUntyped == 0 {
		c.report(n, "floating point in deterministic code")
	}
}

func isFloat(t types.Type) bool {
	b, ok := t.(*types.Basic)
	return ok && b.Info()&(types.IsFloat|types.IsComplex) != 0
}

func (c *checker) loop(n *ast.RangeStmt) {
	tv := c.info.Types[n.X]
	if tv.Type == nil {
		return
	}
	switch tv.Type.Underlying().(type) {
	case *types.Map:
		if !c.ordered[c.fset.Position(n.Pos()).Line] {
			c.report(n, "range over a map, whose order is random; if it cannot matter, say why: %sreason", mark)
		}
	case *types.Chan:
		c.report(n, "range over a channel in deterministic code")
	}
}

func (c *checker) selector(n *ast.SelectorExpr) {
	fn, ok := c.info.Uses[n.Sel].(*types.Func)
	if !ok || fn.Pkg() == nil || fn.Signature().Recv() != nil {
		return
	}
	switch path, name := fn.Pkg().Path(), fn.Name(); {
	case path == "time" && slices.Contains(clocks, name):
		c.report(n, "time.%s in deterministic code; time comes from devices.Clock", name)
	case path == "maps" && slices.Contains(mapOrder, name):
		if !c.ordered[c.fset.Position(n.Pos()).Line] {
			c.report(n, "maps.%s, whose order is random; if it cannot matter, say why: %sreason", name, mark)
		}
	}
}
