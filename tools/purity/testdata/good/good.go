// Package good looks like a device and keeps the rules.
package good

import (
	"fmt"
	"sort"
	"time"

	"github.com/ftvmm/ftvmm/devices"
)

const period = 1e9 / 1000 // an integer, however it is written

type device struct {
	clock   *devices.Clock
	names   map[string]int
	timeout time.Duration
}

func (d *device) sorted() []string {
	var out []string
	for name := range d.names { //purity:ordered sorted below
		out = append(out, name)
	}
	sort.Strings(out)
	//purity:ordered a sum has no order
	for _, n := range d.names {
		d.timeout += time.Duration(n) * period
	}
	for i := range 3 {
		out = append(out, fmt.Sprint(i, d.clock.Now(), d.names["x"]))
	}
	return out
}
