// Package plot draws distributions as SVG: pictures of measured times that need neither a script nor
// a font of their own, that a browser shows in a document, and that are the same bytes for the
// same samples.
//
// A distribution is drawn as its cumulative share over a logarithmic axis: at x is the share of samples that are
// x or less. Nothing is binned or smoothed, so that a tail of one sample in a thousand can be
// seen, and a lower quantile of one series can be read against a higher of another.
//
// Colours follow the reader's light or dark setting (prefers-color-scheme); a program that does not
// know it shows the light ones, on a white ground. Lines differ in their dashes, too.
package plot

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"
)

// Series is a distribution: samples, in any order, all in the plot's unit.
type Series struct {
	Name    string
	Samples []float64
}

// MaxSeries is how many series a plot can have: as many as there are colours that can be told apart.
const MaxSeries = 8

// Quantile returns the sample that the share q (0 to 1) of sorted samples does not exceed: the
// nearest rank, so it is always one of them. Of no samples it is 0.
func Quantile(sorted []float64, q float64) float64 {
	n := len(sorted)
	if n == 0 {
		return 0
	}
	return sorted[min(max(int(math.Ceil(q*float64(n)))-1, 0), n-1)]
}

// The picture, in pixels.
const (
	width    = 760
	left     = 56 // of the axes
	right    = width - 24
	top      = 52
	bottom   = 332
	legend   = bottom + 78 // baseline of its first line
	line     = 20          // height of a line of the legend
	swatch   = 30          // width of a line's sample
	tickText = 44          // least distance between two labels
)

// Columns of the legend: where a name begins, and where numbers end.
var columns = [...]float64{left + swatch + 10, 470, 550, 640, right}

// style has colours of Okabe and Ito, which the colour-blind can tell apart too, made darker or lighter for each ground.
const style = `
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.title{font-size:16px;font-weight:600}
.small{font-size:12px;fill:#59636e}
.end{text-anchor:end}.mid{text-anchor:middle}
.ground{fill:#ffffff}
.axis{stroke:#59636e;stroke-width:1;fill:none}
.major{stroke:#d1d9e0;stroke-width:1}.minor{stroke:#eaeef2;stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.s0{stroke:#0072b2}.s1{stroke:#c04f00}.s2{stroke:#00805c}.s3{stroke:#a8447f}
.s4{stroke:#2b8cc4}.s5{stroke:#9a6b00}.s6{stroke:#24292f}.s7{stroke:#b52525}
.s1{stroke-dasharray:8 3}.s2{stroke-dasharray:3 3}.s3{stroke-dasharray:9 3 2 3}
.s5{stroke-dasharray:8 3}.s6{stroke-dasharray:3 3}.s7{stroke-dasharray:9 3 2 3}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.small{fill:#9198a1}
.ground{fill:#0d1117}
.axis{stroke:#9198a1}.major{stroke:#3d444d}.minor{stroke:#21262d}
.s0{stroke:#58a6e8}.s1{stroke:#f0883e}.s2{stroke:#3fc795}.s3{stroke:#e088b8}
.s4{stroke:#7cc7f0}.s5{stroke:#e3b341}.s6{stroke:#e6edf3}.s7{stroke:#ff7b72}
}
`

// CDF writes the cumulative distributions of series as one SVG. Samples must be finite; those that are
// not positive, which a logarithmic axis has no place for, count at its left end. A series without samples stands in
// the legend only; there must be a sample in one of them. Nothing is written if it fails before w does.
func CDF(w io.Writer, title, unit string, series []Series) error {
	if len(series) > MaxSeries {
		return fmt.Errorf("plot %q: %d series, at most %d can be told apart", title, len(series), MaxSeries)
	}
	sorted := make([][]float64, len(series))
	for i, s := range series {
		for _, v := range s.Samples {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return fmt.Errorf("plot %q: series %q has a sample of %v", title, s.Name, v)
			}
		}
		sorted[i] = slices.Sorted(slices.Values(s.Samples))
	}
	x, ok := newAxis(sorted)
	if !ok {
		return fmt.Errorf("plot %q: no samples", title)
	}
	d := drawing{}
	height := legend + line*len(series) + 4
	d.printf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`+"\n", width, height, width, height)
	d.printf("<title>%s</title>\n<style>%s</style>\n", escape(title), style)
	d.printf(`<rect class="ground" width="%d" height="%d"/>`+"\n", width, height)
	d.text("title", left, 30, title)
	d.grid(x, unit)
	for i, s := range sorted {
		d.curve(i, x, s)
	}
	d.legend(unit, series, sorted)
	d.printf("</svg>\n")
	_, err := w.Write(d.Bytes())
	return err
}

// drawing is the SVG as far as it is written.
type drawing struct{ bytes.Buffer }

func (d *drawing) printf(format string, args ...any) { fmt.Fprintf(d, format, args...) }

func (d *drawing) text(class string, x, y float64, s string) {
	d.printf(`<text class="%s" x="%s" y="%s">%s</text>`+"\n", class, pixel(x), pixel(y), escape(s))
}

func (d *drawing) line(class string, x1, y1, x2, y2 float64) {
	d.printf(`<line class="%s" x1="%s" y1="%s" x2="%s" y2="%s"/>`+"\n", class, pixel(x1), pixel(y1), pixel(x2), pixel(y2))
}

// shareY returns where a share is on the vertical axis.
func shareY(share float64) float64 { return bottom - share*(bottom-top) }

func (d *drawing) grid(x axis, unit string) {
	for percent := 0; percent <= 100; percent += 25 {
		y, class := shareY(float64(percent)/100), "minor"
		if percent%50 == 0 {
			class = "major"
		}
		d.line(class, left, y, right, y)
		d.text("small end", left-8, y+4, fmt.Sprint(percent))
	}
	d.text("small end", left-8, top-12, "%")
	for _, t := range x.ticks {
		px, class := x.at(t.value), "minor"
		if t.major {
			class = "major"
		}
		d.line(class, px, top, px, bottom)
		if t.label != "" {
			d.text("small mid", px, bottom+18, t.label)
		}
	}
	d.printf(`<path class="axis" d="M%d %dV%dH%d"/>`+"\n", left, top, bottom, right)
	if unit != "" {
		d.text("small mid", (left+right)/2, bottom+36, unit)
	}
}

// curve draws the steps of sorted samples, from the first sample to the last. Of the samples in one pixel only the last step is drawn, so
// that the size of a picture does not depend on how many there are.
func (d *drawing) curve(index int, x axis, sorted []float64) {
	n := len(sorted)
	if n == 0 {
		return
	}
	d.printf(`<path class="curve s%d" d="M%s %d`, index, pixel(x.at(sorted[0])), bottom)
	for i := 0; i < n; {
		px := x.at(sorted[i])
		j := i + 1
		for j < n && (sorted[j] == sorted[i] || x.at(sorted[j])-px < 1) {
			j++
		}
		if i > 0 {
			d.printf("H%s", pixel(px))
		}
		d.printf("V%s", pixel(shareY(float64(j)/float64(n))))
		i = j
	}
	d.printf(`"/>` + "\n")
}

// legend says which line is which, and the numbers that are asked for most.
func (d *drawing) legend(unit string, series []Series, sorted [][]float64) {
	for i, head := range []string{"samples", "median", "99 %", "most"} {
		if i > 0 && unit != "" {
			head += ", " + unit
		}
		d.text("small end", columns[i+1], legend-line-2, head)
	}
	for i, s := range series {
		y := float64(legend + line*i)
		d.line(fmt.Sprintf("curve s%d", i), left, y-4, left+swatch, y-4)
		d.text("", columns[0], y, fit(s.Name))
		d.text("end", columns[1], y, fmt.Sprint(len(sorted[i])))
		for j, q := range []float64{0.5, 0.99, 1} {
			v := "–"
			if len(sorted[i]) > 0 {
				v = number(Quantile(sorted[i], q))
			}
			d.text("end", columns[2+j], y, v)
		}
	}
}

// maxName is how many characters of a name have room in the legend.
const maxName = 42

func fit(name string) string {
	if utf8.RuneCountInString(name) <= maxName {
		return name
	}
	return string([]rune(name)[:maxName-1]) + "…"
}

// axis is the logarithmic one, from the first tick to the last.
type axis struct {
	lo, hi float64 // logarithms to base 10
	ticks  []tick
}

type tick struct {
	value float64
	major bool // a power of ten
	label string
}

// maxDecades bounds an axis: more than there are between the least and the largest time that anything takes.
const maxDecades = 40

// newAxis returns the axis: from the last tick before all samples to the first one after, a tick being 1, 2 or 5
// times a power of ten. False if there are no samples.
func newAxis(sorted [][]float64) (axis, bool) {
	least, most, some := math.Inf(1), math.Inf(-1), false
	for _, s := range sorted {
		some = some || len(s) > 0
		for _, v := range s {
			if v > 0 {
				least = min(least, v)
				break
			}
		}
		if n := len(s); n > 0 && s[n-1] > 0 {
			most = max(most, s[n-1])
		}
	}
	if !some {
		return axis{}, false
	}
	if math.IsInf(least, 1) { // nothing but zeros
		least, most = 1, 1
	}
	least = max(least, most/math.Pow10(maxDecades))
	var all []tick
	first := int(math.Floor(math.Log10(least))) - 1
	last := int(math.Ceil(math.Log10(most))) + 1
	for e := first; e <= last; e++ {
		for _, m := range []float64{1, 2, 5} {
			// Parsed, not multiplied: 2 * 10^-1 has to be what is written as 0.2.
			v, err := strconv.ParseFloat(fmt.Sprintf("%ge%d", m, e), 64)
			if err != nil || v == 0 { // beyond what a float64 can hold
				continue
			}
			all = append(all, tick{value: v, major: m == 1})
		}
	}
	from, to := 0, len(all)-1
	for from+1 < len(all) && all[from+1].value < least {
		from++
	}
	for to-1 > from && all[to-1].value > most {
		to--
	}
	a := axis{lo: math.Log10(all[from].value), hi: math.Log10(all[to].value), ticks: all[from : to+1]}
	a.label()
	return a, true
}

// label names as many ticks as have room: all, or the powers of ten, or some of those.
func (a *axis) label() {
	decade := (right - left) / (a.hi - a.lo)
	every := int(math.Ceil(tickText / decade))
	for i := range a.ticks {
		t := &a.ticks[i]
		exponent := int(math.Round(math.Log10(t.value)))
		if decade*math.Log10(2) >= tickText || t.major && exponent%every == 0 {
			t.label = number(t.value)
		}
	}
}

// at returns where a value is on the axis.
func (a *axis) at(v float64) float64 {
	if v <= 0 {
		return left
	}
	share := (math.Log10(v) - a.lo) / (a.hi - a.lo)
	return left + min(max(share, 0), 1)*(right-left)
}

// pixel writes a place in the picture.
func pixel(v float64) string { return strconv.FormatFloat(math.Round(v*10)/10, 'f', -1, 64) }

// number writes a value with three digits, and all of its integral ones where those are not many.
func number(v float64) string {
	if v >= 100 && v < 1e6 {
		return strconv.FormatFloat(math.Round(v), 'f', -1, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

func escape(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s)) // a buffer takes everything
	return b.String()
}
