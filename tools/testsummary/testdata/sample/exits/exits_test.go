package exits

import (
	"fmt"
	"os"
	"testing"
)

func TestMain(*testing.M) {
	fmt.Println("the set-up failed")
	os.Exit(3)
}
