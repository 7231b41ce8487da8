// Package bad does everything that deterministic code must not do. Each line that is a violation ends with
// the beginning of what purity says about it.
package bad

import (
	"maps"
	"math/rand" // want "import of math/rand"
	"os"        // want "import of os"
	"sync"      // want "import of sync"
	. "time"

	"github.com/ftvmm/ftvmm/vmm/event" // want "import of github.com/ftvmm/ftvmm/vmm/event, which is not pure"
	tm "time"
)

var (
	mu    sync.Mutex
	_     = os.Args
	_     = rand.Int
	_     event.Kind
	ratio float64 // want "floating point"
	half  = 0.5   // want "floating point"
)

type named map[string]int

func all(m map[int]int, n named, ch chan int) {
	go all(nil, nil, nil) // want "go statement"
	for range m {         // want "range over a map"
	}
	for k := range n { // want "range over a map"
		_ = k
	}
	//purity:ordered
	for range n { // want "range over a map"
	}
	for range maps.Keys(m) { // want "maps.Keys"
	}
	for range ch { // want "range over a channel"
	}
	ch <- 1  // want "channel send"
	_ = <-ch // want "channel receive"
	select { // want "select"
	default:
	}
	_ = tm.Now()               // want "time.Now"
	f := tm.Since              // want "time.Since"
	tm.Sleep(1)                // want "time.Sleep"
	_ = f(tm.Time{}).Seconds() // a method is not found; its result has no name here
}

// A dot import hides the selector, but not the package.
var _ Duration
