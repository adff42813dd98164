// The emulator's primitives against what was recorded of them and, once there is a record,
// of a card's.
#include "conformance/results.h"
#include "emu_test.h"

namespace fae::cuda::testing {
namespace {

using EmuConformance = EmulatorTest;

std::string record(const std::string& name) {
  const std::string here = __FILE__;
  return here.substr(0, here.rfind('/')) + "/conformance/" + name;
}

TEST_F(EmuConformance, AsRecordedOfTheEmulator) {
  const conformance::Results wanted = conformance::read(record("emulator.txt"));
  ASSERT_FALSE(wanted.empty());
  for (uint64_t seed = 0; seed < 3; ++seed) {
    emu::options().seed = seed;
    EXPECT_EQ(conformance::difference(conformance::compute(), wanted), "") << seed;
  }
}

TEST_F(EmuConformance, AsRecordedOfHardware) {
  const conformance::Results wanted = conformance::read(record("hardware.txt"));
  if (wanted.empty()) GTEST_SKIP() << "no card has been recorded yet";
  EXPECT_EQ(conformance::difference(conformance::compute(), wanted), "");
}

TEST_F(EmuConformance, RecordsAreReadAsTheyWereWritten) {
  conformance::Results results = conformance::compute();
  std::string path = ::testing::TempDir() + "/fae_conformance.txt";
  std::ofstream(path) << conformance::to_text(results, "test");
  EXPECT_EQ(conformance::read(path), results);
  results["to_tf32"][5] ^= 1;
  results.erase("shuffle");
  const std::string text = conformance::difference(results, conformance::read(path));
  EXPECT_NE(text.find("to_tf32: word 5 is"), std::string::npos) << text;
  EXPECT_NE(text.find("shuffle: another shape"), std::string::npos) << text;
  std::remove(path.c_str());
}

}  // namespace
}  // namespace fae::cuda::testing
