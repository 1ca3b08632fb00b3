// Which commands count as plain, and what they say.
#include "../ring/express.h"

#include "check.h"

using namespace tcmu;

namespace {

// The CDB alone in memory of its own size: reading past it is the sanitizer's to report.
std::optional<PlainMove> judge(std::vector<uint8_t> cdb) {
  return plainMove(cdb.data(), static_cast<uint32_t>(cdb.size()));
}

const std::vector<uint8_t> kRead10 = {0x28, 0, 1, 2, 3, 4, 0, 5, 6, 0};
const std::vector<uint8_t> kWrite10 = {0x2a, 0, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0};
const std::vector<uint8_t> kRead16 = {0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0};
const std::vector<uint8_t> kWrite16 = {0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0};

bool says(std::vector<uint8_t> cdb, bool write, uint64_t lba, uint32_t blocks) {
  const auto move = judge(std::move(cdb));
  return move && move->write == write && move->lba == lba && move->blocks == blocks;
}

}  // namespace

TEST(the_four_plain_commands) {
  EXPECT(says(kRead10, false, 0x01020304, 0x0506));
  EXPECT(says(kWrite10, true, 0xffffffff, 0xffff));
  EXPECT(says(kRead16, false, 0x0102030405060708, 0x090a0b0c));
  EXPECT(says(kWrite16, true, 7, 1));
}

TEST(any_bit_outside_lba_and_length_is_for_the_handler) {
  for (const auto& plain : {kRead10, kWrite10, kRead16, kWrite16}) {
    const size_t last = plain.size() - 1;
    const size_t group = plain.size() == 10 ? 6 : 14;
    for (const size_t at : {size_t{1}, group, last}) {
      for (int bit = 0; bit < 8; bit++) {
        auto cdb = plain;
        cdb[at] |= static_cast<uint8_t>(1 << bit);
        EXPECT(!judge(cdb));
      }
    }
  }
}

TEST(every_other_operation_code_is_for_the_handler) {
  for (int opcode = 0; opcode < 256; opcode++) {
    const bool plain = opcode == 0x28 || opcode == 0x2a || opcode == 0x88 || opcode == 0x8a;
    std::vector<uint8_t> cdb(16);
    cdb[0] = static_cast<uint8_t>(opcode);
    cdb[8] = cdb[13] = 1;  // the length, of either form
    EXPECT(judge(cdb).has_value() == plain);
  }
}

TEST(a_transfer_of_nothing_is_for_the_handler) {
  auto short_form = kRead10;
  short_form[7] = short_form[8] = 0;
  EXPECT(!judge(short_form));
  auto long_form = kWrite16;
  long_form[13] = 0;
  EXPECT(!judge(long_form));
}

TEST(a_cut_cdb_is_not_read_past_its_end) {
  for (const auto& plain : {kRead10, kWrite10, kRead16, kWrite16}) {
    for (size_t bytes = 1; bytes < plain.size(); bytes++)
      EXPECT(!judge({plain.begin(), plain.begin() + static_cast<ptrdiff_t>(bytes)}));
  }
}

int main() { return check::runAll(); }
