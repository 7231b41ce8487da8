package vmm_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/vmm"
)

// terminal is a console: it shows what the guest writes and could type to it.
type terminal struct{ typed chan string }

func (t terminal) Output(p []byte) { fmt.Print(string(p)) }

func (t terminal) Start(deliver func(p []byte)) {
	go func() {
		for s := range t.typed {
			deliver([]byte(s))
		}
	}()
}

// Boot a guest, let its console write to standard output, and wait for its end.
func Example() {
	kernel, err := guests.Image("hello") // any kernel file would do
	if err != nil {
		log.Fatal(err)
	}
	console := terminal{typed: make(chan string, 1)}
	defer close(console.typed)
	m, err := vmm.New(vmm.Config{
		Memory: 32 << 20, Kernel: kernel, Cmdline: "from=Go quiet", Serial: []vmm.Console{console},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	console.typed <- "anything\n"
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	exit, err := m.Run(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(exit.Reason, exit.Code)
	// Output:
	// hello from ring 3
	// cmdline: from=Go quiet
	// ok loader pvh
	// ok memory map with a megabyte or more of RAM
	// # memory 0x0 size 0x9fc00 type 1
	// # memory 0x9fc00 size 0x400 type 2
	// # memory 0xe0000 size 0x20000 type 2
	// # memory 0x100000 size 0x1f00000 type 1
	// debug-exit 0
}
