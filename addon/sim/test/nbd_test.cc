// SPDX-License-Identifier: Apache-2.0
// The NBD server under the sanitizers: mutated handshakes, garbage, and clients that come and go.
#include <sys/socket.h>
#include <sys/un.h>

#include <csignal>
#include <random>
#include <thread>

#include "../../nbd/listener.h"
#include "../../nbd/server.h"
#include "check.h"
#include "ram_handler.h"

using namespace tcmu;
using namespace tcmu::nbd;
using namespace std::chrono_literals;

namespace {

std::vector<uint8_t> option(Option option, std::span<const uint8_t> data = {}) {
  std::vector<uint8_t> bytes;
  Writer(bytes)
      .put(kOptionMagic)
      .put(static_cast<uint32_t>(option))
      .put(static_cast<uint32_t>(data.size()))
      .text({reinterpret_cast<const char*>(data.data()), data.size()});
  return bytes;
}

void append(std::vector<uint8_t>& to, const std::vector<uint8_t>& bytes) {
  to.insert(to.end(), bytes.begin(), bytes.end());
}

// Everything a client may send before transmission.
std::vector<uint8_t> handshake() {
  std::vector<uint8_t> bytes;
  Writer(bytes).put(uint32_t{kFixedNewstyle | kNoZeroes});
  append(bytes, option(Option::structuredReply));
  append(bytes, option(Option::list));
  std::vector<uint8_t> query;
  Writer(query).put(0u).put(1u).put(15u).text(kAllocationContext);
  append(bytes, option(Option::setMetaContext, query));
  append(bytes, option(Option::listMetaContext, query));
  std::vector<uint8_t> go;
  Writer(go).put(0u).put(uint16_t{3}).put(uint16_t{1}).put(uint16_t{2}).put(uint16_t{3});
  append(bytes, option(Option::info, go));
  append(bytes, option(Option::go, go));
  return bytes;
}

// Each 28 bytes; writes without their data, which makes garbage of what follows.
std::vector<uint8_t> requests(std::mt19937& random, size_t count) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < count; i++) {
    const auto type = static_cast<uint16_t>(random() % 9);
    const uint32_t length = random() % 4 ? random() % 32 * 512 : static_cast<uint32_t>(random());
    Writer(bytes)
        .put(kRequestMagic)
        .put(static_cast<uint16_t>(random() % 3 ? 0 : random() % 64))
        .put(type)
        .put(uint64_t{i})
        .put(random() % 4 ? uint64_t{random() % 2048 * 512} : uint64_t{random()} << 32)
        .put(length);
    if (type == 1 && length < 65536) Writer(bytes).zeroes(length);
  }
  return bytes;
}

struct Answering : Observer {
  void happened(Event event) override {
    if (event.kind != Event::Kind::describe) return;
    server->described(event.connection, Disk{.size = 1 << 20,
                                             .flags = flag::kHasFlags | flag::kFlush | flag::kFua |
                                                      flag::kTrim | flag::kWriteZeroes |
                                                      flag::kCache | flag::kFastZero,
                                             .fuaInWrite = true,
                                             .tellsStatus = true,
                                             .unmapsToZero = true});
  }
  Server* server = nullptr;
};

UniqueFd dial(const std::string& path) {
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) fd.reset();
  return fd;
}

// One that keeps to the protocol, with one request at a time and simple replies.
class HonestClient {
 public:
  explicit HonestClient(const std::string& path) : fd_(dial(path)) {
    std::vector<uint8_t> bytes;
    Writer(bytes).put(uint32_t{kFixedNewstyle | kNoZeroes});
    std::vector<uint8_t> go;
    Writer(go).put(0u).put(uint16_t{0});
    append(bytes, option(Option::go, go));
    give(bytes);
    take(18);  // the greeting
    while (fd_) {
      const std::vector<uint8_t> header = take(20);
      take(load<uint32_t>(&header[16]));
      if (load<uint32_t>(&header[12]) == 1) break;  // NBD_REP_ACK
    }
  }

  // Whether the request went well; what was read is in `data`.
  bool request(CommandType type, uint64_t offset, std::span<uint8_t> data) {
    std::vector<uint8_t> bytes;
    Writer(bytes)
        .put(kRequestMagic)
        .put(uint16_t{0})
        .put(static_cast<uint16_t>(type))
        .put(++cookie_)
        .put(offset)
        .put(static_cast<uint32_t>(data.size()));
    if (type == CommandType::write) bytes.insert(bytes.end(), data.begin(), data.end());
    give(bytes);
    const std::vector<uint8_t> reply = take(kSimpleReplyBytes);
    if (!fd_ || load<uint32_t>(&reply[0]) != kSimpleReplyMagic || load<uint32_t>(&reply[4]) != 0 ||
        load<uint64_t>(&reply[8]) != cookie_)
      return false;
    if (type == CommandType::read) {
      const std::vector<uint8_t> got = take(data.size());
      std::copy(got.begin(), got.end(), data.begin());
    }
    return static_cast<bool>(fd_);
  }

  // Writes, reads back and compares `count` times; how often that went well.
  int exchange(int count, uint8_t seed) {
    int good = 0;
    for (int i = 0; i < count; i++) {
      std::vector<uint8_t> data(4096, static_cast<uint8_t>(seed + i));
      const std::vector<uint8_t> expected = data;
      const uint64_t offset = static_cast<uint64_t>(i) % 200 * 4096;
      if (!request(CommandType::write, offset, data)) continue;
      data.assign(data.size(), 0);
      if (request(CommandType::read, offset, data) && (!compares || data == expected)) good++;
    }
    return good;
  }

  // Not where others write to the same disk.
  bool compares = true;

 private:
  void give(std::span<const uint8_t> bytes) {
    while (fd_ && !bytes.empty()) {
      const ssize_t n = send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return fd_.reset();
      bytes = bytes.subspan(static_cast<size_t>(n));
    }
  }
  std::vector<uint8_t> take(size_t count) {
    std::vector<uint8_t> bytes(count);
    for (size_t at = 0; fd_ && at < count;) {
      const ssize_t n = recv(fd_.get(), bytes.data() + at, count - at, 0);
      if (n <= 0)
        fd_.reset();
      else
        at += static_cast<size_t>(n);
    }
    return bytes;
  }

  UniqueFd fd_;
  uint64_t cookie_ = 0;
};

TEST(mutatedHandshakesAreTakenOrRefused) {
  const std::vector<uint8_t> good = handshake();
  std::mt19937 random(7);
  const Config config{.name = "disk", .description = "a test"};
  size_t finished = 0;
  for (int round = 0; round < 20000; round++) {
    std::vector<uint8_t> bytes = good;
    for (uint32_t n = random() % 4; n > 0; n--)
      bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
    if (random() % 4 == 0) bytes.resize(random() % bytes.size());
    Negotiation negotiation(config);
    std::vector<uint8_t> out;
    negotiation.greet(out);
    std::span<const uint8_t> in = bytes;
    for (bool more = true; more;) {
      Negotiation::Step step = negotiation.take(in, out);
      if (step == Negotiation::Step::describe)
        step = negotiation.described(round % 8 ? std::optional(Disk{.size = 4096}) : std::nullopt,
                                     out);
      if (step == Negotiation::Step::transmission) finished++;
      more = step == Negotiation::Step::taken;
    }
  }
  CHECK(finished > 1000);
}

TEST(clientsThatSendGarbageAndVanish) {
  const auto device = std::make_shared<sim::Device>(
      sim::Geometry{.ringBytes = 64 << 10, .dataBytes = 1 << 20}, sim::Attributes{});
  // Answers GOOD to everything it does not know: the server has to live with nonsense.
  auto handler = std::make_unique<sim::RamHandler>(*device, 64 << 20);
  char directory[] = "/tmp/tcmu-nbd-test-XXXXXX";
  CHECK(mkdtemp(directory) != nullptr);
  const std::string path = std::string(directory) + "/sock";
  Answering observer;
  auto server = std::make_unique<Server>(device, Config{}, listenAt(path), observer);
  observer.server = server.get();

  std::vector<std::thread> clients;
  for (uint32_t seed = 1; seed <= 4; seed++) {
    clients.emplace_back([&path, seed] {
      std::mt19937 random(seed);
      for (int round = 0; round < 60; round++) {
        const UniqueFd fd = dial(path);
        std::vector<uint8_t> bytes = handshake();
        append(bytes, requests(random, random() % 300));
        if (random() % 4 == 0) bytes[random() % bytes.size()] ^= static_cast<uint8_t>(random());
        bytes.resize(bytes.size() - random() % 64);
        const timeval patience{0, 2000};
        setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        for (size_t at = 0; at < bytes.size();) {
          const size_t part = std::min<size_t>(bytes.size() - at, 1 + random() % 20000);
          if (send(fd.get(), bytes.data() + at, part, MSG_NOSIGNAL) < 0) break;
          at += part;
          uint8_t reply[4096];
          if (random() % 2 && recv(fd.get(), reply, sizeof reply, 0) == 0) break;
        }
      }
    });
  }
  // Among them one that has to be served all the same.
  constexpr int kExchanges = 300;
  {
    HonestClient honest(path);
    honest.compares = false;
    CHECK_EQ(honest.exchange(kExchanges, 1), kExchanges);
  }
  for (std::thread& client : clients) client.join();
  // Some that have come and gone may not have been accepted yet.
  const auto isDone = [&server] {
    const auto counts = server->counts();
    return counts.connections == 0 && counts.accepted == 241;
  };
  for (int i = 0; i < 100000 && !isDone(); i++) std::this_thread::sleep_for(1ms);
  CHECK_EQ(server->counts().connections, 0);
  CHECK_EQ(server->counts().accepted, 241);
  CHECK(server->idle());
  // Two of each exchange; the rest is what made sense of the others' (some 400).
  const uint64_t commands = server->counts().commands;
  CHECK(commands > 2 * kExchanges + 100);
  // What they leave behind: a server that loses no request and no byte.
  {
    HonestClient honest(path);
    CHECK_EQ(honest.exchange(kExchanges, 7), kExchanges);
  }
  CHECK_EQ(server->counts().commands, commands + 2 * kExchanges);
  server->abandon();
  device->stop();
  server.reset();
  handler.reset();
  unlink(path.c_str());
  rmdir(directory);
}

}  // namespace

int main() {
  std::signal(SIGPIPE, SIG_IGN);
  return check::run();
}
