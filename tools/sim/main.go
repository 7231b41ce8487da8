// Command sim runs the lockstep protocol in its simulator (package lockstep/sim), seed by seed.
//
// Usage: sim [--seeds N] [--seed S] [--trace]
//
// It runs N seeds from S on, on all processors, and prints what they did. For a seed that breaks
// an invariant it prints the end of the transcript and the command that repeats it, and exits 1.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/ftvmm/ftvmm/lockstep/sim"
)

// tail is how much of a failed run's transcript is printed without --trace.
const tail = 8 << 10

func main() {
	flags := flag.NewFlagSet("sim", flag.ContinueOnError)
	seeds := flags.Int("seeds", 200, "how many seeds to run")
	first := flags.Uint64("seed", 1, "the first seed; alone it runs only this one")
	trace := flags.Bool("trace", false, "print the whole transcript")
	if err := flags.Parse(os.Args[1:]); err != nil {
		os.Exit(2)
	}
	single := false
	given := false
	flags.Visit(func(f *flag.Flag) {
		single = single || f.Name == "seed"
		given = given || f.Name == "seeds"
	})
	if single && !given {
		*seeds = 1
	}
	if *seeds < 1 || flags.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "sim: want --seeds N with N of at least 1, and no other arguments")
		os.Exit(2)
	}
	if !run(os.Stdout, *first, *seeds, *trace) {
		os.Exit(1)
	}
}

// run runs the seeds and reports whether all of them held.
func run(out io.Writer, first uint64, seeds int, trace bool) bool {
	var (
		mu     sync.Mutex
		wg     sync.WaitGroup
		total  sim.Stats
		failed int
		next   = first
		start  = time.Now()
	)
	workers := runtime.NumCPU()
	if trace {
		workers = 1 // transcripts one after the other
	}
	for range workers {
		wg.Go(func() {
			for {
				mu.Lock()
				seed := next
				next++
				mu.Unlock()
				if seed-first >= uint64(seeds) {
					return
				}
				o := sim.Options{Seed: seed}
				if trace {
					o.Trace = out
				}
				stats, err := sim.Run(o)
				mu.Lock()
				total.Add(stats)
				if err != nil {
					failed++
					report(out, seed, err, trace)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	d := time.Since(start)
	fmt.Fprintf(out, "%d seeds, %d failed, %v, %.1f million steps a minute\n", seeds, failed, d.Round(time.Millisecond), float64(total.Steps)/1e6/d.Minutes())
	fmt.Fprintln(out, total)
	return failed == 0
}

// report prints a failure, the end of its transcript, and how to repeat it.
func report(out io.Writer, seed uint64, err error, traced bool) {
	fmt.Fprintf(out, "seed %d: %v\n", seed, err)
	if !traced {
		var b bytes.Buffer
		_, _ = sim.Run(sim.Options{Seed: seed, Trace: &b}) // the error is the one that is being reported
		t := b.Bytes()
		if len(t) > tail {
			t = t[len(t)-tail:]
			t = t[bytes.IndexByte(t, '\n')+1:]
		}
		fmt.Fprintf(out, "%s", t)
	}
	fmt.Fprintf(out, "to repeat: ./build.sh sim --seed %d --trace\n", seed)
}
