// SPDX-License-Identifier: Apache-2.0
// Which commands count as plain, and what they say; where a disk's bytes lie.
#include "../ring/express.h"

#include <string>

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

namespace {

constexpr size_t kHead = FileMap::kFiles * FileMap::kFileWords;
constexpr uint64_t kUnit = 4096;

// Its words alone in memory of their own size.
struct Table {
  explicit Table(size_t entries) : words(kHead + 2 * entries, -1), count(entries) {}
  void set(uint64_t unit, uint64_t offset, uint32_t file, bool writable) {
    double* entry = words.data() + kHead + 2 * (unit % count);
    entry[0] = static_cast<double>(unit);
    entry[1] = static_cast<double>(offset + 2 * file + writable);
  }
  FileMap map() const { return FileMap(words.data(), words.size(), 12); }
  std::vector<double> words;
  size_t count;
};

// Found as "file:position+length file:position+length".
std::string found(const Table& table, uint64_t position, uint64_t length, bool write = false,
                  uint32_t most = 4) {
  std::vector<FileMap::Run> runs(most);
  const uint32_t count = table.map().find(position, length, write, runs.data(), most);
  std::string text;
  for (uint32_t i = 0; i < count; i++) {
    text += (i > 0 ? " " : "") + std::to_string((runs[i].file - table.words.data()) / 3) + ":" +
            std::to_string(runs[i].position) + "+" + std::to_string(runs[i].length);
  }
  return text;
}

}  // namespace

TEST(only_a_table_is_a_table) {
  const std::vector<double> words(kHead + 2 * 8);
  const auto fits = [&](size_t count, uint32_t bits) {
    return !FileMap(words.data(), count, bits).empty();
  };
  EXPECT(FileMap().empty());
  EXPECT(fits(kHead + 2, 9) && fits(kHead + 16, 52));
  for (const size_t count : {size_t{0}, kHead, kHead + 1, kHead + 3, kHead + 6, kHead + 12})
    EXPECT(!fits(count, 12));
  EXPECT(!fits(kHead + 16, 8) && !fits(kHead + 16, 53));
}

TEST(places_within_a_unit_and_over_units) {
  Table table(8);
  table.set(2, 1 << 20, 3, false);
  table.set(3, (1 << 20) + kUnit, 3, false);
  table.set(4, 512, 3, false);
  table.set(5, 512 + kUnit, 4, false);
  EXPECT(found(table, 2 * kUnit + 512, 512) == "3:1049088+512");
  EXPECT(found(table, 2 * kUnit, 2 * kUnit) == "3:1048576+8192");
  EXPECT(found(table, 3 * kUnit + 512, kUnit) == "3:1053184+3584 3:512+512");
  // The same number of another file is another place.
  EXPECT(found(table, 4 * kUnit, 2 * kUnit) == "3:512+4096 4:4608+4096");
}

TEST(what_is_not_all_known_is_not_known) {
  Table table(8);
  table.set(2, 0, 0, true);
  table.set(3, 4 * kUnit, 0, false);
  EXPECT(found(table, kUnit, 512).empty());
  EXPECT(found(table, 2 * kUnit - 512, 1024).empty());
  EXPECT(found(table, 4 * kUnit - 512, 1024).empty());
  // Of another unit that shares the entry.
  EXPECT(found(table, 10 * kUnit, 512).empty());
  EXPECT(found(table, uint64_t{1} << 52, 512).empty());
  EXPECT(found(table, 2 * kUnit, kUnit, true) == "0:0+4096");
  EXPECT(found(table, 2 * kUnit, 2 * kUnit, true).empty());
}

TEST(no_more_runs_than_there_is_room_for) {
  Table table(8);
  for (uint64_t unit = 0; unit < 8; unit++) table.set(unit, 2 * unit * kUnit, 0, true);
  EXPECT(found(table, 0, 2 * kUnit, false, 2) == "0:0+4096 0:8192+4096");
  EXPECT(found(table, 0, 2 * kUnit + 512, false, 2).empty());
}

TEST(one_unit_for_all) {
  Table table(1);
  table.set(0, 0, 15, true);
  const FileMap map(table.words.data(), table.words.size(), 52);
  FileMap::Run run;
  const uint64_t far = (uint64_t{1} << 52) - 512;
  EXPECT(map.find(far, 512, true, &run, 1) == 1);
  EXPECT(run.position == far && run.length == 512);
  EXPECT(map.find(far, 1024, true, &run, 1) == 0);
}

int main() { return check::runAll(); }
