package plot

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// element is any element of a picture.
type element struct {
	XMLName  xml.Name
	Class    string    `xml:"class,attr"`
	D        string    `xml:"d,attr"`
	Text     string    `xml:",chardata"`
	Children []element `xml:",any"`
}

func draw(t require.TestingT, title, unit string, series ...Series) element {
	var b bytes.Buffer
	require.NoError(t, CDF(&b, title, unit, series))
	var e element
	d := xml.NewDecoder(&b)
	require.NoError(t, d.Decode(&e))
	_, err := d.Token()
	require.True(t, err == nil || errors.Is(err, io.EOF), "after the root: %v", err)
	return e
}

func (e *element) curves() (d []string) {
	for _, c := range e.Children {
		if c.XMLName.Local == "path" && strings.HasPrefix(c.Class, "curve ") {
			d = append(d, c.D)
		}
	}
	return d
}

func (e *element) texts() (s []string) {
	for _, c := range e.Children {
		if c.XMLName.Local == "text" {
			s = append(s, c.Text)
		}
	}
	return s
}

func TestStepsAreTheSharesOfTheSamples(t *testing.T) {
	// The axis goes from 0.5 to 200 over 680 pixels, so 10 is in its middle; a share of one is 280 pixels high.
	e := draw(t, "t", "ms", Series{"four", []float64{100, 1, 10, 10}})
	require.Equal(t, "svg", e.XMLName.Local)
	require.Equal(t, "http://www.w3.org/2000/svg", e.XMLName.Space)
	require.Equal(t, []string{"M134.7 332V262H396V122H657.3V52"}, e.curves())
	require.Subset(t, e.texts(), []string{"t", "ms", "1", "2", "5", "10", "20", "50", "100", "four", "4"})
}

func TestNumbersOfTheLegend(t *testing.T) {
	var s []float64
	for i := range 1000 {
		s = append(s, float64(i+1)/10)
	}
	e := draw(t, "", "ms", Series{"many", s}, Series{"none", nil})
	texts := e.texts()
	require.Equal(t, []string{"many", "1000", "50", "99", "100", "none", "0", "–", "–", "–"}, texts[len(texts)-10:])
}

func TestQuantile(t *testing.T) {
	s := []float64{1, 2, 3, 4}
	for _, tt := range []struct {
		q, want float64
	}{{0, 1}, {0.25, 1}, {0.26, 2}, {0.5, 2}, {0.99, 4}, {1, 4}} {
		require.Equal(t, tt.want, Quantile(s, tt.q), "%v", tt.q)
	}
	require.Zero(t, Quantile(nil, 0.5))
}

func TestAxis(t *testing.T) {
	for _, tt := range []struct {
		name        string
		samples     []float64
		first, last float64
		labels      string
	}{
		{"between ticks", []float64{3, 30}, 2, 50, "2 5 10 20 50"},
		{"one value", []float64{7}, 5, 10, "5 10"},
		{"one value on a tick", []float64{10}, 5, 20, "5 10 20"},
		{"less than one", []float64{0.02, 0.3}, 0.01, 0.5, "0.01 0.02 0.05 0.1 0.2 0.5"},
		{"zero is at the left end", []float64{0, 2, 4}, 1, 5, "1 2 5"},
		{"nothing but zero", []float64{0, 0}, 0.5, 2, "0.5 1 2"},
		{"powers only", []float64{1e-3, 1e4}, 5e-4, 2e4, "0.001 0.01 0.1 1 10 100 1000 10000"},
		{"some powers only", []float64{1e-15, 1e8}, 5e-16, 2e8, "1e-14 1e-12 1e-10 1e-08 1e-06 0.0001 0.01 1 100 10000 1e+06 1e+08"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, ok := newAxis([][]float64{nil, tt.samples})
			require.True(t, ok)
			var labels []string
			for _, k := range a.ticks {
				if k.label != "" {
					labels = append(labels, k.label)
				}
			}
			require.Equal(t, tt.labels, strings.Join(labels, " "))
			require.Equal(t, tt.first, a.ticks[0].value)
			require.Equal(t, tt.last, a.ticks[len(a.ticks)-1].value)
		})
	}
	_, ok := newAxis([][]float64{nil, nil})
	require.False(t, ok)
}

func TestManySamplesMakeNoLargePicture(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	s := make([]float64, 100_000)
	for i := range s {
		s[i] = math.Exp(r.NormFloat64())
	}
	var b bytes.Buffer
	require.NoError(t, CDF(&b, "", "ms", []Series{{"many", s}}))
	require.Less(t, b.Len(), 32<<10)
	require.Contains(t, b.String(), `V52"/>`, "the curve reaches 100 %")
}

func TestTextIsEscaped(t *testing.T) {
	e := draw(t, `a < b & "c"`, "<ms>", Series{strings.Repeat("é", 50) + "</svg>", []float64{1}})
	require.Contains(t, e.texts(), `a < b & "c"`)
	require.Contains(t, e.texts(), "<ms>")
	require.Contains(t, e.texts(), strings.Repeat("é", 41)+"…")
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		series []Series
		want   string
	}{
		{"nothing", nil, "no samples"},
		{"empty", []Series{{"a", nil}}, "no samples"},
		{"not a number", []Series{{"a", []float64{math.NaN()}}}, "NaN"},
		{"infinite", []Series{{"a", []float64{math.Inf(1)}}}, "+Inf"},
		{"too many", make([]Series, MaxSeries+1), "at most 8"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b bytes.Buffer
			require.ErrorContains(t, CDF(&b, "t", "", tt.series), tt.want)
			require.Zero(t, b.Len())
		})
	}
}

func TestAnySamplesMakeAPicture(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		samples := rapid.SliceOfN(rapid.Float64(), 1, 50)
		var series []Series
		for range rapid.IntRange(1, MaxSeries).Draw(t, "series") {
			series = append(series, Series{rapid.String().Draw(t, "name"), samples.Draw(t, "samples")})
		}
		e := draw(t, rapid.String().Draw(t, "title"), "ms", series...)
		require.Len(t, e.curves(), len(series))
		for _, d := range e.curves() {
			require.NotContains(t, d, "NaN")
			require.True(t, strings.HasSuffix(d, "V52"), d)
		}
	})
}

// The picture in testdata is there to be looked at; it changes only if the drawing does.
func TestPicture(t *testing.T) {
	const path = "testdata/example.svg"
	var b bytes.Buffer
	require.NoError(t, CDF(&b, "An example: time until the answer", "ms", example()))
	if os.Getenv("UPDATE") != "" {
		require.NoError(t, os.WriteFile(path, b.Bytes(), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), b.String(), "UPDATE=1 go test ./tools/bench/plot writes it anew")
}

// example is made without a logarithm or exponential, whose last bit differs between architectures.
func example() []Series {
	var s [3]Series
	for i, name := range []string{"ftvmm", "QEMU COLO, a checkpoint each 100 ms", "QEMU live migration, 256 MiB"} {
		s[i].Name = name
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		u := r.Float64()
		s[0].Samples = append(s[0].Samples, 0.4+0.3*u/(1.02-u))
		s[1].Samples = append(s[1].Samples, 44+3*r.Float64()/(1.01-u))
	}
	for range 12 {
		s[2].Samples = append(s[2].Samples, 40+30*r.Float64())
	}
	return s[:]
}
