package firmware

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Where Debian keeps the images, and the package that each comes from.
var (
	seabiosPaths = []string{"/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin"}
	ovmfPaths    = []string{"/usr/share/OVMF/OVMF_CODE_4M.fd"}
	vgaBIOSPaths = []string{"/usr/share/seabios/vgabios-stdvga.bin", "/usr/share/vgabios/vgabios-stdvga.bin"}
)

// FindSeaBIOS returns the path of the host's SeaBIOS image.
func FindSeaBIOS() (string, error) { return find("SeaBIOS", "seabios", seabiosPaths) }

// FindOVMF returns the path of the host's OVMF image, the build without secure boot
// and without system management mode.
func FindOVMF() (string, error) { return find("OVMF", "ovmf", ovmfPaths) }

// FindVGABIOS returns the path of the host's option ROM for the standard VGA adapter.
func FindVGABIOS() (string, error) { return find("VGA BIOS", "seabios", vgaBIOSPaths) }

func find(what, pkg string, paths []string) (string, error) {
	for _, p := range paths {
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", &Error{Code: "firmware-missing", Problem: fmt.Sprintf("no %s image on this host, looked for %q", what, paths),
		Remedy: "apt-get install " + pkg + ", or name an image in the configuration"}
}

// ReadImage reads a firmware image and checks that it can be one.
func ReadImage(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err == nil && st.Size() > MaxImage {
		err = fmt.Errorf("%d bytes, at most %d are possible", st.Size(), MaxImage)
	}
	var image []byte
	if err == nil {
		image, err = os.ReadFile(path)
	}
	if err != nil {
		e := &Error{Code: "firmware-unreadable", Problem: "read the firmware image " + path, Err: err, Remedy: "name an image that ftvmm can read"}
		if errors.Is(err, fs.ErrNotExist) {
			e.Remedy = "apt-get install seabios ovmf, or name an image that exists"
		}
		return nil, e
	}
	if err := CheckImage(image); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return image, nil
}

// resetVector is the distance of the first instruction from the end of an image
// (Intel SDM vol. 3, 10.1.4).
const resetVector = 16

// CheckImage says whether a file can be a firmware image: whole pages, no larger than
// MaxImage, with something at the reset vector.
func CheckImage(image []byte) error {
	if err := checkImageSize(uint64(len(image))); err != nil {
		return err
	}
	for _, b := range image[len(image)-resetVector:] {
		if b != 0 && b != 0xff {
			return nil
		}
	}
	return &Error{Code: "firmware-bad", Problem: "the firmware image has no code at the reset vector, 16 bytes before its end",
		Remedy: "use bios-256k.bin of SeaBIOS or OVMF_CODE_4M.fd of OVMF"}
}

func checkImageSize(n uint64) error {
	if n == 0 || n%memory.PageSize != 0 || n > MaxImage {
		return &Error{Code: "firmware-bad", Problem: fmt.Sprintf("a firmware image cannot have %d bytes", n),
			Remedy: fmt.Sprintf("use an image of whole pages of 4 KiB, up to %d MiB", MaxImage>>20)}
	}
	return nil
}

// LoadImage places a firmware image so that it ends at 4 GiB, and copies its last
// 128 KiB to [BIOSBase], as the chip set of a PC shows its flash at both places.
func LoadImage(mem *memory.Memory, image []byte) error {
	if err := CheckImage(image); err != nil {
		return err
	}
	if err := mem.Write(HighRAMBase-uint64(len(image)), image); err != nil {
		return fmt.Errorf("firmware: place an image of %d bytes below 4 GiB: %w", len(image), err)
	}
	tail := image[len(image)-min(len(image), BIOSEnd-BIOSBase):]
	if err := mem.Write(BIOSEnd-uint64(len(tail)), tail); err != nil {
		return fmt.Errorf("firmware: place the BIOS below 1 MiB: %w", err)
	}
	return nil
}
